"""Shadow tokens: what each candidate exit would have said where the target has spoken, within a budget.

The verification hands out the hidden states after every candidate exit, so a shadow token costs one row of the LM
head and nothing else. On a small batch even one row reads the whole head: what the budget does not cover in one round
is saved up, and spent on many rows at once.
"""

import time
from collections.abc import Callable, Sequence

import torch

from vllm_del.draft.head import Head
from vllm_del.policy.cost import SHADOW_ROWS, CostTables

PROMPT_POSITIONS = 32
"""How many of a prompt's last positions tell what to expect of the sequence (the paper's number)."""

BURST = 32
"""How many rows are worth a pass of the head where not all that are wanted can be paid."""

IDLE = 0.125
"""What is spent of the budget where nothing is drafted: nothing but that drafting may pay again is to be learnt."""


class ShadowScorer:
    """Scores (position, exit) pairs, chosen at random where the budget does not cover all of them."""

    def __init__(
        self,
        read_out: Callable[[torch.Tensor], torch.Tensor],
        head: Head,
        # what the target itself goes through
        whole_head: Head,
        # None: everything is scored, whatever it costs
        costs: CostTables | None,
        # of a verification's time, the part that may go into scoring
        share: float,
        device: torch.device,
        # whether the host's clock tells what scoring takes, beside the head too, and no other rank has to agree
        by_clock: bool = False,
    ) -> None:
        self._read_out = read_out
        self.head = head
        self.whole_head = whole_head
        self._costs = costs
        self.share = share
        self._by_clock = by_clock
        # Seconds, as the clock has them: what may be spent, and what scoring took so far.
        self._saved, self.seconds = 0.0, 0.0
        # Of its own: drawing from torch's would change what unseeded requests sample.
        self._random = torch.Generator(device).manual_seed(0)

    def earn(self, tokens: int, drafts: bool) -> None:
        """A forward over so many tokens has run: its share is there to be spent, or less where nothing is drafted."""
        if self._costs is not None:
            verify = self._costs.correction.verify * self._costs.verify_seconds(tokens)
            earned = self.share * (1 if drafts else IDLE) * verify
            self._saved = min(self._saved + earned, self._head_seconds(SHADOW_ROWS))

    def affordable(self, wanted: int, most: int) -> int:
        """How many of `wanted` head rows to score now; 0 if it is better to go on saving.

        `most` is how many might have been wanted, whatever was accepted. It decides: rounds in which little was
        accepted want little, and if these were asked more often than others, all exits would look worse than they are.
        """
        if self._costs is None:
            return wanted
        payable = self._costs.head_rows(self._saved / self._costs.correction.verify)
        # Not a few rows at the price of the whole weight while more of them cost little more.
        if payable < min(most, BURST):
            return 0
        number = min(wanted, payable)
        self._saved -= self._head_seconds(number)
        return number

    def target_tokens(
        self,
        # [positions, hidden size]: after all layers, hidden state and residual together
        states: torch.Tensor,
    ) -> torch.Tensor:
        """What the target says there, [positions] int64. Paid for afterwards."""
        begun = time.perf_counter()
        tokens = torch.cat([self.whole_head(self._read_out(part))[0] for part in states.split(SHADOW_ROWS)])
        self._took(time.perf_counter() - begun, len(states), paid=0.0)
        return tokens

    def score(
        self,
        # after each exit [tokens, hidden size]: hidden state and residual together
        states: Sequence[torch.Tensor],
        # [pairs] int64 each: which token, after which exit
        at: torch.Tensor,
        exit: torch.Tensor,
        # [pairs] int64: what the target said there
        target: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the shadow tokens are the target's, [pairs] bool, and their probabilities, [pairs] float32."""
        begun, agreements, probabilities = time.perf_counter(), [], []
        # States and logits of all of them at once might not fit in memory.
        parts = (values.split(SHADOW_ROWS) for values in (at, exit, target))
        for some, after, expected in zip(*parts, strict=True):
            of_each = torch.stack([state[some] for state in states])
            picked = of_each[after, torch.arange(len(some), device=some.device)]
            agrees, probability = self.head.agree(self._read_out(picked), expected)
            agreements.append(agrees)
            probabilities.append(probability)
        self._took(time.perf_counter() - begun, len(at), paid=1.0)
        return torch.cat(agreements), torch.cat(probabilities)

    def _took(self, seconds: float, rows: int, paid: float) -> None:
        """Scoring took so long for so many rows of the head; of what the tables say of these a part is paid."""
        self.seconds += seconds
        if self._costs is not None:
            by_table = self._head_seconds(rows)
            self._saved -= (seconds if self._by_clock else by_table) - paid * by_table

    def _head_seconds(self, rows: int) -> float:
        assert self._costs is not None
        # A machine that is slower is so in the head too.
        return self._costs.correction.verify * self._costs.head_seconds(rows)

    def choose(
        self,
        # [...] bool
        wanted: torch.Tensor,
        number: int,
    ) -> torch.Tensor:
        """`number` flat places of `wanted`, uniformly at random of the true ones; if too few, false ones."""
        lots = torch.rand(wanted.numel(), device=wanted.device, generator=self._random)
        return (lots + wanted.flatten()).topk(number, sorted=False).indices
