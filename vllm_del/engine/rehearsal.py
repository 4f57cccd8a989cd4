"""What a round consists of, over made-up rows, for the measurement of what it costs."""

from collections.abc import Callable
from typing import Protocol

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_del.draft.head import Head
from vllm_del.draft.loop import DraftRows, Drafts, Forward, Plan, draft

CONTEXT, LONG_CONTEXT = 256, 2048
"""The context lengths of made-up rows, where the model allows as much."""

STEPS = 3
"""Draft steps at once: what comes before each one in service comes before it here, so what the caches hold is alike."""


AT_ONCE = 4
"""And so many rounds of drafts before the host waits for them, where the device is another one: in service the host
prepares the next one meanwhile."""


class Performer(Protocol):
    """A drafter, as far as it can do what it does in service for rows that nobody asked for."""

    vllm_config: VllmConfig
    kv_cache_config: KVCacheConfig
    head: Head
    device: torch.device
    compact: bool
    """Whether it takes rows that are done out of a round."""

    @property
    def even(self) -> bool:
        """Whether a verification of several rows runs otherwise where they have different lengths."""
        ...

    def made_up_round(self, rows: int, longest: int) -> tuple[DraftRows, Forward]:
        """What a round of at least so many rows, of contexts up to `longest` tokens, would draft with."""
        ...

    def made_up_verification(self, lengths: list[int], context: int) -> float | None:
        """A forward of the whole model with its logits and their argmax, over rows of so many tokens each, after
        contexts of `context` tokens; or over as many tokens and as much context in other rows. What it took by the
        device's clock, in seconds, where that is not the host's."""
        ...


class Rehearsal:
    """Each call is complete when it returns. Made-up rows read and write any blocks: nothing is served yet.

    Drafts and the head are done `at_once` times in a call, `steps` draft steps in all.
    """

    def __init__(self, performer: Performer) -> None:
        self._performer = performer
        self._device = performer.device
        self.head_text = str(performer.head)
        config = performer.vllm_config
        self._model = config.model_config
        max_model_len = self._model.max_model_len
        budget = config.scheduler_config.max_num_batched_tokens
        self.verify_each = max(1, min(1 + config.num_speculative_tokens, budget, max_model_len - 1))
        most = max(1, max_model_len - self.verify_each)
        self.even = performer.even
        self.at_once = 1 if self._device.type == "cpu" else AT_ONCE
        self._steps_of_round = min(STEPS, self.verify_each)
        self.steps = self.at_once * self._steps_of_round
        self.context, self.long_context = min(CONTEXT, most), min(LONG_CONTEXT, most)
        self._make_up_blocks(config.scheduler_config.max_num_seqs)

    def drafting(self, rows: int, segments: int, context: int) -> Callable[[], None]:
        """What runs draft steps through the first `segments` segments, from a context of so many tokens."""
        steps = self._steps_of_round
        longest = context + steps
        zeros = torch.zeros(rows, dtype=torch.int64, device=self._device)
        tokens, seq_lens, live = zeros.int(), (zeros + context).int(), zeros == 0
        padded = self._make_up_blocks(rows)
        plan = Plan.uniform(padded, segments - 1, steps, self._device)
        room = torch.zeros(padded, steps, device=self._device)
        drafts = Drafts(tokens=room.long(), confidence=room)

        @torch.inference_mode()
        def run() -> None:
            for _ in range(self.at_once):
                made_up, forward = self._performer.made_up_round(rows, longest)
                made_up.begin(tokens, seq_lens, zeros, live)
                draft(forward, made_up, plan, longest, drafts, self._performer.compact)
            self._wait()

        return run

    @torch.inference_mode()
    def head(self, rows: int) -> None:
        """The head on so many rows."""
        shape = rows, self._model.get_hidden_size()
        states = torch.zeros(shape, dtype=self._model.dtype, device=self._device)
        for _ in range(self.at_once):
            self._performer.head(states)
        self._wait()

    @torch.inference_mode()
    def verify(self, tokens: int, each: int, context: int) -> float | None:
        """A forward of the whole model with its logits and their argmax, over rows of `each` tokens. Seconds, where the
        host's clock does not tell."""
        rows, rest = divmod(tokens, each)
        seconds = self._performer.made_up_verification([each] * rows + [rest] * (rest > 0), context)
        self._wait()
        return seconds

    def _make_up_blocks(self, rows: int) -> int:
        """Give rows blocks that differ as far as there are as many: reading one over and over would be too fast. How
        many rows there are, with padding."""
        made_up, _ = self._performer.made_up_round(rows, 1)
        for table in made_up.block_tables:
            blocks = torch.arange(table.numel(), dtype=table.dtype, device=self._device)
            table.copy_((blocks % self._performer.kv_cache_config.num_blocks).view_as(table))
        return len(made_up.live)

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
