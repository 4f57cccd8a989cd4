"""The planner: exit layer and draft length of every sequence, for the highest goodput of the batch.

Goodput is the expected tokens of a round over its time (design of SmartSpec, arXiv 2406.14066, here with an exit of
each sequence's own). A ratio of two sums, so a fractional programme: for a price of time `r`, the plan with the
largest `tokens - r * time` is found; the goodput of that plan is the next price, until the price does not change
(Dinkelbach, 1967). One step of that is made a round, as rounds are alike. What makes it separable by row: what a step
costs however many rows are in it is paid by the batch's deepest exit and longest draft; for each choice of these two,
each row takes what is best within them.
"""

from dataclasses import dataclass

import torch

from vllm_del.policy.cost import CostTables
from vllm_del.policy.objective import expected_tokens

HYSTERESIS = 0.02
"""By what share of a round's tokens another plan has to be better than the last one's shape to replace it."""

CAUTION = 0.04
"""And by what share any drafting has to be better than none: estimates err, and the best of many errs upwards."""


@dataclass
class Decision:
    """A plan by row, with what is expected of it: tensors on the planner's device."""

    # [rows] int64: an index into the exits
    exit: torch.Tensor
    # [rows] int64: 0 for none
    length: torch.Tensor
    # [rows] float64: tokens that one more draft of the row has to yield to be worth the time it takes itself
    worth: torch.Tensor
    # scalars, float64: tokens that are worth what a step takes however many rows are in it
    step_worth: torch.Tensor
    # and of the whole batch, in tokens and seconds
    tokens: torch.Tensor
    draft_time: torch.Tensor
    verify_time: torch.Tensor
    # [exits] bool, if it was asked for: whether a plan with this exit would be better than any other if its drafts were
    # always accepted
    could_win: torch.Tensor | None


@dataclass
class Rates:
    """Of this round: its times are those of the tables where verification is as they say. A machine that is fast in
    everything changes no plan."""

    # what draft steps take in proportion to their tables, and beside these, in seconds
    slower: float
    step_overhead: float
    # scalar, float64: seconds of a verification without drafts
    verify: torch.Tensor


class Planner:
    """Plans a batch; keeps the price, and what it chose last, to stay with it unless another plan is clearly better."""

    def __init__(self, depths: torch.Tensor, costs: CostTables, max_length: int) -> None:
        self.depths = depths
        self.costs = costs
        self.lengths = torch.arange(max_length + 1, device=depths.device)
        # By the number of rows: what a step to each exit costs for any number of them and what each one adds, both
        # [rows + 1, exits], and what a token adds to the verification if all rows draft as many, [rows + 1, longest].
        self._shared, self._per_row = self._step_costs()
        self._per_token = self._token_costs()
        self._price = torch.zeros((), dtype=torch.float64, device=depths.device)
        self._num_rows = 0
        # [exits, longest]: the last plan's shape, its deepest exit and longest draft
        self._last = torch.zeros(len(depths), max_length + 1, dtype=torch.bool, device=depths.device)

    def plan(
        self,
        # [rows, exits] float64
        acceptance: torch.Tensor,
        # [rows] int64: the longest draft of each row; 0 where it must not draft
        limit: torch.Tensor,
        # [rows] int: the context length of each row
        context: torch.Tensor,
        # how many of the rows, the last ones, are not in the batch: they get what is best for them within its plan
        beside: int = 0,
        # whether to tell which exits could win
        contest: bool = False,
    ) -> Decision:
        """The plan of the highest goodput, of those within `limit`, at the last plan's price of time."""
        lengths, costs, num_rows = self.lengths, self.costs, len(limit) - beside
        rates = self._rates(num_rows, context[:num_rows])
        shared = rates.slower * self._shared[num_rows] + rates.step_overhead
        per_row = rates.slower * self._per_row[num_rows]
        longer = (context - costs.context).double()
        # Another number of rows has another goodput: begin with that of not drafting.
        price = self._price if num_rows == self._num_rows else num_rows / rates.verify
        # [rows, exits, length]: what drafting adds to the one token that a round yields anyway
        gain = expected_tokens(acceptance, len(lengths) - 1) - 1
        gain = gain.masked_fill(lengths > limit[:, None, None], -torch.inf)
        # What a row's drafts cost: each for its context, [rows, exits], and all beside that and what the batch shares,
        # [exits, length, longest]
        layers_context = self.depths * (rates.slower * costs.layer_context)
        of_context = longer.unsqueeze(1) * (layers_context + costs.token_context)
        row_cost = lengths[:, None] * (per_row[:, None, None] + self._per_token[num_rows])
        row_cost = row_cost.masked_fill(lengths[:, None] > lengths, torch.inf)

        # [rows, exits, longest]: the best of each row at each exit, and then at any exit up to that one
        net = gain - price * of_context.unsqueeze(2) * lengths
        value, length = (net.unsqueeze(-1) - price * row_cost).max(2)
        best, exit = value.cummax(1)
        # [exits, longest]: the batch's, with what it shares
        of_batch = price * lengths * shared[:, None]
        if uneven := costs.uneven(num_rows):
            of_batch = of_batch + price * uneven * (lengths > 0)
        total = best[:num_rows].sum(0) - of_batch
        could_win = None
        if contest:
            # The same with an exit that is always right, and the others as they are.
            always = (lengths - price * of_context.unsqueeze(2) * lengths).masked_fill(gain.isinf(), -torch.inf)
            at_most = torch.maximum((always.unsqueeze(-1) - price * row_cost).amax(2), best)
            could_win = (at_most[:num_rows].sum(0) - of_batch).amax(1) > total.max()
        # [1] all: indices that stay on the device
        shape = self._choose(total, price * rates.verify)
        deepest, longest = shape // len(lengths), shape % len(lengths)
        row_exit = exit.flatten(1).index_select(1, shape)
        row_length = length.flatten(1).gather(1, row_exit * len(lengths) + longest).squeeze(1)
        row_exit = row_exit.squeeze(1)
        of_row_context = of_context.gather(1, row_exit.unsqueeze(1)).squeeze(1)
        itself = per_row[row_exit] + self._per_token[num_rows].index_select(0, longest) + of_row_context
        worth = price * itself, price * shared.index_select(0, deepest).squeeze(0)
        expected = self._expect(
            gain[:num_rows], row_exit[:num_rows], row_length[:num_rows], of_row_context[:num_rows], rates
        )
        decision = Decision(row_exit, row_length, *worth, *expected, could_win)

        self._price.copy_(decision.tokens / (decision.draft_time + decision.verify_time))
        self._num_rows = num_rows
        self._last.zero_().view(-1).index_fill_(0, shape, True)
        return decision

    def _choose(self, total: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The shape, flat, [1] int64, of the largest total; the last one's, or none, if that is nearly as good."""
        favour = HYSTERESIS * self._last + CAUTION * (self.lengths == 0)
        return (total + favour * tokens).flatten().argmax().unsqueeze(0)

    def _rates(self, num_rows: int, context: torch.Tensor) -> Rates:
        costs, of = self.costs, self.costs.correction
        slower, overhead, step_overhead = (value / of.verify for value in (of.draft, of.overhead, of.step))
        verify = costs.verify[num_rows] + costs.verify_context * context.sum() + overhead
        return Rates(slower, step_overhead, verify)

    def _step_costs(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(len(self.costs.step), device=self.depths.device)

        def split(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            slope = (table[: len(rows)] - table[1]) / (rows - 1).clamp_min(1)
            return (table[1] - slope).unsqueeze(1), slope.unsqueeze(1)

        (step, step_row), (layer, layer_row), (head, head_row) = (
            split(table) for table in (self.costs.step, self.costs.layer, self.costs.head)
        )
        return step + self.depths * layer + head, step_row + self.depths * layer_row + head_row

    def _token_costs(self) -> torch.Tensor:
        rows = torch.arange(len(self.costs.step), device=self.depths.device).unsqueeze(1)
        drafted = rows * self.lengths
        verify = self.costs.verify
        return (verify[rows + drafted] - verify[rows]) / drafted.clamp_min(1)

    def _expect(
        self,
        gain: torch.Tensor,
        exit: torch.Tensor,
        length: torch.Tensor,
        of_context: torch.Tensor,
        rates: Rates,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the plan yields in tokens, and its drafts and its verification take in seconds: by the tables, and
        without the split into shared and per row."""
        costs, num_rows = self.costs, len(exit)
        per_exit = gain.gather(1, exit[:, None, None].expand(-1, 1, gain.shape[2])).squeeze(1)
        tokens = num_rows + per_exit.gather(1, length.unsqueeze(1)).sum()
        # [rows, steps]: who still drafts in each step
        drafting = length.unsqueeze(1) > self.lengths[:-1]
        rows = drafting.sum(0)
        depth = torch.where(drafting, self.depths[exit].unsqueeze(1), 0).amax(0)
        steps = costs.step[rows] + depth * costs.layer[rows] + costs.head[rows]
        draft_time = rates.slower * steps.sum() + rates.step_overhead * (rows > 0).sum() + (length * of_context).sum()
        verify_drafts = costs.verify.index_select(0, (num_rows + length.sum()).view(1)).squeeze(0)
        verify_time = rates.verify + verify_drafts - costs.verify[num_rows]
        if uneven := costs.uneven(num_rows):
            verify_time = verify_time + uneven * (length > 0).any().double()
        return tokens, draft_time, verify_time
