"""Asks exits what they would have said where the target has spoken: after drafts, and within prompts.

Where the host knows the plans, an exit of which no answer could change one is not asked, and its time is saved.
"""

import torch

from vllm_del.draft.shadow import PROMPT_POSITIONS, ShadowScorer
from vllm_del.draft.upload import upload
from vllm_del.draft.verified import Verified
from vllm_del.policy.acceptance import AcceptanceStatistics


class Asker:
    """Spends the shadow budget, on every exit or on those that a plan may come to use."""

    def __init__(self, shadow: ShadowScorer, statistics: AcceptanceStatistics, num_exits: int, on_host: bool) -> None:
        self._shadow = shadow
        self._statistics = statistics
        self._num_exits = num_exits
        # Whether the host sees the device's values at once
        self._on_host = on_host
        self.ask_all(False)
        # By the last plan: which exits are asked, [exits] bool, or all; and whether a sequence that comes will draft
        self._could_win: torch.Tensor | None = None
        self._strangers_draft = False

    def ask_all(self, everything: bool) -> None:
        """Whether to ask exits that no plan needs: where plans are not known here, they are asked anyway."""
        self.asks_all = everything or not self._on_host

    def follow(self, could_win: torch.Tensor, strangers_draft: bool) -> None:
        """A plan is made: it tells whom to ask, [exits] bool, and what a sequence without a past does."""
        self._could_win, self._strangers_draft = could_win, strangers_draft
        if not could_win.all():
            # What was heard of the others gets old.
            self._statistics.fade(~could_win)

    def after_drafts(
        self,
        verified: Verified,
        # [rows, positions, exits] each: what is known, to be completed
        matched: torch.Tensor,
        confidence: torch.Tensor,
        scored: torch.Tensor,
        # [rows, positions] bool
        kept: torch.Tensor,
    ) -> None:
        """Ask exits that did not draft what they would have said, as far as the budget goes."""
        wanted = kept.unsqueeze(-1) & ~scored
        if not self.asks_all:
            if self._could_win is not None:
                wanted &= self._could_win
            if self._drafts_tell():
                # What the exit says after a draft of its own adds little to that.
                wanted &= ~scored.any(1, keepdim=True)
        most = wanted.numel()
        # No row has more positions than these, which the host knows.
        wanted = wanted[:, : 1 + verified.longest]
        number = self._shadow.affordable(int(wanted.sum()) if self._on_host else wanted.numel(), most)
        if not number:
            return
        chosen = self._shadow.choose(wanted, number)
        row, rest = chosen // wanted[0].numel(), chosen % wanted[0].numel()
        step, exit = rest // wanted.shape[2], rest % wanted.shape[2]
        # What is not wanted may lie anywhere.
        last = verified.input_ids.shape[0] - 1
        at = (verified.start[row] + step).clamp_max(last)
        accepted_token = verified.input_ids[(at + 1).clamp_max(last)]
        target = torch.where(step < verified.accepted[row], accepted_token, verified.next_token[row]).long()
        agrees, probability = self._shadow.score(verified.states, at, exit, target)
        # Where fewer are wanted than were chosen, the rest must not touch what was verified.
        places = row, step, exit
        new = wanted[places]
        matched[places] = torch.where(new, agrees, matched[places])
        confidence[places] = torch.where(new, probability, confidence[places])
        scored[places] |= new

    def in_prompts(
        self,
        # [rows] int64
        slots: torch.Tensor,
        verified: Verified,
    ) -> tuple[torch.Tensor, ...]:
        """What the target says within prompts that end here, as `AcceptanceStatistics.observe` takes it of one round;
        nothing if nobody is asked."""
        if not self.asks_all and self._drafts_tell():
            return ()
        row = upload([row for row, positions in verified.ended for _ in range(positions)], slots.device)
        back = upload([1 + i for _, positions in verified.ended for i in range(positions)], slots.device)
        exits = torch.arange(self._num_exits, device=slots.device)
        if not self.asks_all and self._could_win is not None:
            exits = exits[self._could_win]
        if not (each := len(exits)):
            return ()
        number = self._shadow.affordable(len(row) * each, len(row) * each) // each
        if not number:
            return ()
        chosen = self._shadow.choose(torch.ones_like(row, dtype=torch.bool), number)
        row, back = row[chosen], back[chosen]
        at = verified.start[row] - back
        target = self._shadow.target_tokens(verified.states[-1][at])
        exit = exits.repeat(number)
        pairs = at.repeat_interleave(each), exit, target.repeat_interleave(each)
        agrees, probability = self._shadow.score(verified.states, *pairs)
        # [rows, positions, exits]
        shape = (len(slots), PROMPT_POSITIONS, self._num_exits)
        matched = torch.zeros(shape, dtype=torch.bool, device=slots.device)
        scored, confidence = torch.zeros_like(matched), torch.zeros(shape, device=slots.device)
        where = row.repeat_interleave(each), back.repeat_interleave(each) - 1, exit
        matched[where], confidence[where] = agrees, probability
        # Of tensors on the device: a plain `True` would be copied there, and the host would wait.
        scored[where] = torch.ones_like(agrees)
        return tuple(values.unsqueeze(0) for values in (matched, confidence, scored))

    def _drafts_tell(self) -> bool:
        """Whether sequences are so alike that what others drafted tells more of a new one than all of its prompt, and
        it will draft too. To be asked where the host sees the device's values."""
        return self._strangers_draft and bool(self._statistics.population.strength > PROMPT_POSITIONS)
