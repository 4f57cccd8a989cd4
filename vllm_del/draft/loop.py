"""One drafting round, step by step; the same for both of vLLM's runners.

A step feeds one token a sequence: first the token sampled last, then each token drafted from it. The early layers
read the KV that the target's own forward wrote for the context, and write theirs for the drafted positions, into
the sequence's own look-ahead slots. Verification writes those positions again, with equal values for every
accepted token; a rejected position is written again before anything reads it. So there is nothing to copy,
nothing to roll back and no draft prefill.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from vllm_del.draft.head import Head
from vllm_del.draft.network import Layers
from vllm_del.draft.together import Together
from vllm_del.kernels.advance_rows import NO_TOKEN, Said, advance_rows
from vllm_del.kernels.exit_rows import exit_rows


@dataclass
class DraftRows:
    """The rows of a round, one a sequence: tensors on the model's device."""

    # [rows] int32: the token each row feeds next
    input_ids: torch.Tensor
    # [rows] int64: the position fed last; one before the first draft step's
    positions: torch.Tensor
    # [rows] int32: the context length of the step, its own position included
    seq_lens: torch.Tensor
    # [rows] bool: rows that still draft; the others are computed along and write nothing
    live: torch.Tensor
    # per KV cache group: [rows, max_blocks] int32, the tokens in a block, and [rows] int64
    block_tables: Sequence[torch.Tensor]
    block_sizes: Sequence[int]
    slots: Sequence[torch.Tensor]

    def begin(
        self,
        # [begun] each, of at most as many rows: the token sampled last, the context length that the verification
        # left with the drafts in it, how many of these it rejected, and whether the row drafts
        tokens: torch.Tensor,
        seq_lens: torch.Tensor,
        rejected: torch.Tensor,
        live: torch.Tensor,
    ) -> None:
        """Set the rows for a round. Those beyond, of padding, are in no sequence's place and draft nothing."""
        begun = len(tokens)
        self.input_ids[:begun].copy_(tokens)
        # The next token goes to the position after what was kept.
        self.positions.fill_(-1)
        self.positions[:begun].add_(seq_lens).sub_(rejected)
        self.live.zero_()
        self.live[:begun].copy_(live)

    def advance(self, max_model_len: int, said: Said | None = None) -> None:
        """To the next position: from the one before the first, or after a step."""
        tables = self.block_tables, self.block_sizes, self.slots
        advance_rows(self.positions, self.seq_lens, self.live, *tables, max_model_len, said)

    def take(
        self,
        # [taken] int64
        index: torch.Tensor,
    ) -> "DraftRows":
        """Copies of some of the rows."""
        return DraftRows(
            input_ids=self.input_ids[index],
            positions=self.positions[index],
            seq_lens=self.seq_lens[index],
            live=self.live[index],
            block_tables=[table[index] for table in self.block_tables],
            block_sizes=self.block_sizes,
            slots=[slot[index] for slot in self.slots],
        )


@dataclass
class Plan:
    """What each row drafts in a round: tensors on the model's device, and bounds on them that the host knows."""

    # [rows] int64: the segment after which the row leaves
    exit: torch.Tensor
    # [rows] int64: drafts, 0 for none
    length: torch.Tensor
    # [rows] float32: a draft less probable than this is the row's last one; NaN for never
    stop_below: torch.Tensor
    # at least the largest of `exit` and of `length`
    deepest: int
    longest: int
    # when all rows stop, where the host sees what they drafted; None: when each of them does
    together: Together | None = None
    # whether the host knows that all rows that draft leave after segment `deepest`; it takes the others out
    alike: bool = False

    @classmethod
    def uniform(cls, rows: int, exit: int, length: int, device: torch.device) -> "Plan":
        """The same for every row."""
        full = torch.full((rows,), exit, device=device), torch.full((rows,), length, device=device)
        return cls(*full, torch.full((rows,), torch.nan, device=device), exit, length)

    def take(
        self,
        # [taken] int64
        index: torch.Tensor,
    ) -> "Plan":
        """The plan for some of the rows, where the host knows what is in it."""
        exit, together = self.exit[index], self.together and self.together.take(index)
        shallowest, deepest = exit.aminmax()
        of_rows = exit, self.length[index], self.stop_below[index]
        return Plan(*of_rows, int(deepest), self.longest, together, alike=bool(shallowest == deepest))

    def padded(self, num_rows: int, deepest: int, longest: int) -> "Plan":
        """The same with more rows, which draft nothing, and with other bounds: the shape that other ranks run too."""
        more = (0, num_rows - self.exit.shape[0])
        exit, length, stop_below = (pad(values, more) for values in (self.exit, self.length, self.stop_below))
        return Plan(exit, length, stop_below, deepest, longest)


@dataclass
class Drafts:
    """What a round drafted."""

    # [rows, largest draft length] int64, `NO_TOKEN` after a row's last one
    tokens: torch.Tensor
    # [rows, largest draft length] float32: each token's probability under the exit it was drafted at
    confidence: torch.Tensor


@dataclass
class Launched:
    """What a round launched, as the host knows it."""

    # of each step: rows, and the segment after which the deepest leave
    steps: list[tuple[int, int]]
    # by the host's clock: where it is also the device, what the steps took
    seconds: float


AttentionContext = Callable[[int, DraftRows], AbstractContextManager[None]]
"""`attention(step, rows)` is vLLM's forward context for a draft step: one query token a row, as the rows say."""

Forward = Callable[[int, DraftRows, Plan], tuple[torch.Tensor, torch.Tensor]]
"""`forward(step, rows, plan)` runs the rows through layers and head: tokens [rows] int64, probabilities [rows]
float32."""


def eager(segments: Sequence[Callable[..., Layers]], head: Head, attention: AttentionContext) -> Forward:
    """A draft step operation by operation."""

    def forward(step: int, rows: DraftRows, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        with attention(step, rows):
            exit = None if plan.alike else plan.exit
            states = run_segments(segments[: plan.deepest + 1], rows.input_ids, rows.positions, exit)
        return head(states)

    return forward


def draft(forward: Forward, rows: DraftRows, plan: Plan, max_model_len: int, drafts: Drafts, compact: bool) -> Launched:
    """Draft for every live row what `plan` says, into `drafts`. A row that reaches `max_model_len` stops there.

    `compact` takes rows that are done out of the batch, and ends the round when none is left; it needs their number on
    the host. Otherwise they are computed along, in the shape the round began with.
    """
    begun = time.perf_counter()
    steps: list[tuple[int, int]] = []
    drafts.tokens.fill_(NO_TOKEN)
    if not plan.longest:
        return Launched(steps, 0.0)
    place = torch.arange(rows.live.shape[0], device=rows.live.device)
    rows.live.logical_and_(plan.length > 0)
    rows.advance(max_model_len)
    for step in range(plan.longest):
        if compact and not rows.live.all():
            left = rows.live.nonzero().squeeze(-1)
            if not left.numel():
                break
            rows, plan, place = rows.take(left), plan.take(left), place[left]
        if compact and step and plan.together is not None and not plan.together.pays(rows.live):
            break
        steps.append((rows.live.shape[0], plan.deepest))
        token, confidence = forward(step, rows, plan)
        assert token.shape == rows.live.shape, "compiled layers have forgotten the number of rows"
        to = rows.input_ids, place, drafts.tokens, drafts.confidence
        rows.advance(max_model_len, Said(token, confidence, step, plan.length, plan.stop_below, *to))
        if compact and plan.together is not None:
            plan.together.after(confidence)
    return Launched(steps, time.perf_counter() - begun)


def run_segments(
    segments: Sequence[Callable[..., Layers]],
    # [rows] int, [rows] int64
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    # [rows] int64: the segment after which each row leaves; None: all after the last one
    exit: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the head reads of each row where it leaves, [rows, hidden size]."""
    hidden_states, residual, states = segments[0](input_ids, positions)
    for index, segment in enumerate(segments[1:], start=1):
        hidden_states, residual, deeper = segment(positions, hidden_states, residual)
        if exit is None:
            states = deeper
        else:
            exit_rows(deeper, exit, index, states)
    return states
