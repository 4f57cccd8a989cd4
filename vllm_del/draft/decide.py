"""What a round drafts: always the same (`FixedPolicy`), or what was learnt from the rounds before (`DynamicPolicy`).

A round goes `observe`, `plan`, drafting, `record`. Sequences are known by slots: places that a sequence keeps while it
lives, whatever row of the batch it is in.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

from vllm_del.draft.asker import Asker
from vllm_del.draft.choice import Choice
from vllm_del.draft.clock import Late, Pace, Stopwatch
from vllm_del.draft.loop import NO_TOKEN, Drafts, Launched, Plan
from vllm_del.draft.outcome import Drafted, LastDrafts, Outcome, matches
from vllm_del.draft.shadow import ShadowScorer
from vllm_del.draft.tally import Counts, Tally
from vllm_del.draft.together import Together
from vllm_del.draft.upload import upload
from vllm_del.draft.verified import Verified
from vllm_del.policy.acceptance import AcceptanceStatistics
from vllm_del.policy.objective import best_by_tokens_per_layer
from vllm_del.policy.planner import Planner


class FixedPolicy:
    """Every row drafts as much as it may, and leaves at the only exit there is."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def plan(self, slots: torch.Tensor, _: torch.Tensor, limit: torch.Tensor, context: torch.Tensor) -> Plan:
        never = torch.full((len(limit),), torch.nan, device=limit.device)
        return Plan(torch.zeros_like(limit), limit, never, deepest=0, longest=self.max_length)


class DynamicPolicy:
    """Chooses exit and length by sequence from acceptance, and from measured costs if there is a planner.

    Without one it is the paper's: the exit of the highest tokens per layer, drafts up to the largest length, ended by
    confidence alone.
    """

    def __init__(
        self,
        # candidate exits, ascending
        exits: Sequence[int],
        num_layers: int,
        max_length: int,
        num_slots: int,
        shadow: ShadowScorer,
        planner: Planner | None,
        device: torch.device,
        # whether the host sees the device's values at once, as on a CPU
        on_host: bool,
        # where costs are known
        stopwatch: Stopwatch | None = None,
    ) -> None:
        # The last one is of no sequence, and never learns.
        self.num_slots = num_slots
        self.statistics = AcceptanceStatistics(num_slots + 1, len(exits), device)
        self.shadow = shadow
        self.asker = Asker(shadow, self.statistics, len(exits), on_host)
        self.planner = planner
        self.on_host = on_host
        self.stopwatch = stopwatch
        self._num_layers = num_layers
        self.max_length = max_length
        self._depths = torch.tensor(exits, device=device)
        self._last = LastDrafts(num_slots, max_length, device)
        # What the statistics do not know yet: of the sequences in these slots
        self._outcomes: list[Outcome] = []
        self._outcomes_of = torch.empty(0, dtype=torch.int64)
        # Of the plan of this round, [rows] each: the acceptance rate expected, and whether a row may draft
        self._expected = self._allowed = torch.empty(0)
        self._tally = Tally(len(exits), max_length, device)
        self._late_counts = Late(first=None)
        # If set, a choice serves several rounds.
        self.pace: Pace | None = None
        self._choice: Choice | None = None
        # What observing took for the plan that is to be made, seconds
        self._observing = 0.0
        self._bounds = Late((len(exits) - 1, max_length, max_length))
        # Whether the last round drafted, as far as the host knows
        self._drafts = True

    def counts(self) -> Counts | None:
        """What happened since last time, if it is time to tell."""
        if not self._tally.is_due:
            return None
        values = self._tally.flush()
        known = values.tolist() if self.on_host else self._late_counts.exchange(values)[0]
        return self._tally.counts(known) if known else None

    def observe(self, slots: torch.Tensor, verified: Verified) -> None:
        """Learn from a verification, now or together with later ones."""
        begun, scored_before = time.perf_counter(), self.shadow.seconds
        if self._outcomes and slots is not self._outcomes_of:
            # Before a slot of theirs is another sequence's.
            self.statistics.observe(self._outcomes_of, *matches(self._outcomes, len(self._depths))[:3])
            self._outcomes.clear()
        self._outcomes_of = slots
        fresh = slots[upload(verified.fresh, slots.device)] if verified.fresh else None
        if fresh is not None:
            self.statistics.reset(fresh)
            self._last.forget(fresh)
        outcome = Outcome(self._last.of(slots), verified.drafted, verified.accepted, verified.sampled)
        self._tally.add(outcome)
        self._time(slots, verified.num_tokens, verified.contexts, verified.only_decodes)
        if self.pace is not None:
            self.pace.begin(len(slots), verified.num_tokens, verified.came, verified.left)
        choice, self._choice = self._choice, None
        if choice is not None and self.pace is not None and not self.pace.is_due(self._drafts):
            self._choice = choice if choice.slots is slots else choice.of(slots, fresh, self.num_slots)
        of_prompts = self.asker.in_prompts(slots, verified) if verified.ended else ()
        if verified.longest or self._choice is None:
            self._outcomes.append(outcome)
        if self._choice is not None:
            if of_prompts:
                self.statistics.observe(slots, *of_prompts)
            return
        matched, confidence, scored, kept = matches(self._outcomes, len(self._depths))
        self._outcomes.clear()
        # The states of this round are there to ask the other exits.
        self.asker.after_drafts(verified, matched[-1], confidence[-1], scored[-1], kept[-1])
        seen: tuple[torch.Tensor, ...] = (matched, confidence, scored)
        if of_prompts:
            # Of the same round as what follows the prompt, as in the paper.
            earlier = (0, 0, 0, 0, 0, 0, len(matched) - 1, 0)
            seen = tuple(torch.cat((pad(p, earlier), of), 2) for p, of in zip(of_prompts, seen, strict=True))
        self.statistics.observe(slots, *seen)
        self._observing = time.perf_counter() - begun - (self.shadow.seconds - scored_before)

    def rest(self, slots: torch.Tensor, contexts: int, allowed: int) -> bool:
        """Pass over a round that had no drafts and no prompts, of `contexts` tokens in all, if nothing is drafted after
        it either: whether that is so.

        It is then in place of `observe`, `plan` and `record`: nothing was to be learnt. `allowed` is how many of the
        sequences might have drafted.
        """
        choice = self._choice
        if choice is None or choice.slots is not slots or not choice.idle:
            return False
        if self.pace is None or self.pace.is_due(drafts=False, ahead=1):
            return False
        self.pace.begin(len(slots), len(slots))
        self._time(slots, len(slots), contexts, only_decodes=True)
        self._tally.add_undrafted(allowed)
        if self.stopwatch:
            self.stopwatch.drafted(slots, Launched([], 0.0), self.shadow.seconds)
        return True

    def _time(self, slots: torch.Tensor, num_tokens: int, contexts: float, only_decodes: bool) -> None:
        """A verification of so many tokens is done."""
        if self.stopwatch:
            seconds = self.stopwatch.verified(slots, num_tokens, contexts, only_decodes)
            if seconds is not None:
                self._tally.add_time(*seconds)
        self.shadow.earn(num_tokens, self._drafts)

    def plan(
        self,
        # [rows] each: slots; the longest draft that each row wants, and of that what there is room for in this round;
        # and its context length
        slots: torch.Tensor,
        wished: torch.Tensor,
        limit: torch.Tensor,
        context: torch.Tensor,
    ) -> Plan:
        """What to draft now. A choice is made by what rows want, as it is to serve rounds in which there is other room:
        without drafts the scheduler leaves room for none."""
        if self._choice is None:
            begun = time.perf_counter()
            self._choice = self._choose(slots, wished, context)
            if self.pace is not None:
                self.pace.planned(self._observing + time.perf_counter() - begun)
        choice = self._choice
        exit, length = choice.exit[:-1], torch.minimum(choice.length[:-1], limit)
        together, alike = choice.together, False
        if self.on_host:
            deepest, longest = int((exit * (length > 0)).max()), int(length.max())
            # Where rows that draft nothing leave is of no account.
            together, alike = together and together.begin(len(slots)), bool(((exit == deepest) | (length == 0)).all())
        else:
            # How much there is room for in a round says nothing of the one that these are bounds of.
            wanted = self.wanted * (limit > 0)
            bounds = (exit * (wanted > 0)).max(), wanted.max(), self.wanted.max()
            (deepest, longest, most_wanted), of = self._bounds.exchange(torch.stack(bounds), choice)
            if of is not None:
                of.idle = not most_wanted
            exit, length = exit.clamp_max(deepest), length.clamp_max(longest)
        stop_below, expected = (
            of[:-1].gather(1, exit.unsqueeze(1)).squeeze(1) for of in (choice.stop_below, choice.acceptance)
        )
        self._drafts = longest > 0
        self._expected, self._allowed = expected.nan_to_num(), limit > 0
        return Plan(exit, length, stop_below, deepest, longest, together, alike)

    @property
    def wanted(self) -> torch.Tensor:
        """How long drafts of this round would be if there were room, [rows] int64."""
        assert self._choice is not None
        return self._choice.length[:-1]

    def _choose(self, slots: torch.Tensor, wished: torch.Tensor, context: torch.Tensor) -> Choice:
        """For these rows, and for a sequence that takes the place of one of them."""
        known, longest = pad(slots, (0, 1), value=self.num_slots), pad(wished, (0, 1), value=self.max_length)
        if self.planner is None:
            acceptance = _and_mean(self.statistics.acceptance(slots))
            exit, _ = best_by_tokens_per_layer(acceptance, self._depths, self._num_layers, self.max_length)
            return Choice(slots, exit, longest, self._doubt_below(slots), acceptance)
        acceptance = self.statistics.estimate(known)
        context = torch.cat((context, context.amin().unsqueeze(0)))
        decision = self.planner.plan(acceptance, longest, context, beside=1, contest=not self.asker.asks_all)
        if not self.on_host:
            # What is launched and verified was settled rounds ago: a draft that ends early would save nothing.
            never = torch.full_like(acceptance, torch.nan, dtype=torch.float32)
            return Choice(slots, decision.exit, decision.length, never, acceptance)
        if decision.could_win is not None and wished.any():
            self.asker.follow(decision.could_win, strangers_draft=bool(decision.length[-1]))
        # The paper's threshold is where matches and mismatches look alike. Where most drafts match, one below it may
        # still be accepted: it ends a draft only if the next one would also not be worth its time.
        paper = self._doubt_below(slots)
        offset, slope = map(_and_mean, self.statistics.by_confidence(slots))
        pays_above = (decision.worth.unsqueeze(1) / acceptance - offset) / slope
        stop_below = torch.minimum(paper, pays_above.nan_to_num(-torch.inf).float())
        of_exits = torch.stack((acceptance, paper, offset.where(~slope.isnan(), acceptance), slope.nan_to_num(0)))
        of_exit = of_exits.gather(2, decision.exit[None, :, None].expand(len(of_exits), -1, 1)).squeeze(2)
        expected, doubt_below, offset, slope = of_exit.numpy()
        worth = decision.worth.numpy(), float(decision.step_worth)
        together = Together(expected, doubt_below, offset, slope, *worth, survived=np.ones(len(known)))
        return Choice(slots, decision.exit, decision.length, stop_below, acceptance, together)

    def _doubt_below(self, slots: torch.Tensor) -> torch.Tensor:
        """The paper's threshold of these rows, and for one more, [rows + 1, exits]."""
        # In the type of a warm-up's: a kernel for another one would be compiled while serving.
        return _and_mean(self.statistics.stop_below(slots)).float()

    def record(self, slots: torch.Tensor, plan: Plan, drafts: Drafts, launched: Launched) -> None:
        """Rows beyond those of `slots` are padding."""
        exit, tokens = plan.exit[: len(slots)], drafts.tokens[: len(slots)]
        # The runner's own tensor is written again in the next round.
        confidence = drafts.confidence[: len(slots)].clone()
        length = (tokens != NO_TOKEN).sum(1)
        self._last.keep(slots, Drafted(exit, length, self._expected, self._allowed, confidence))
        if self.stopwatch:
            self.stopwatch.drafted(slots, launched, self.shadow.seconds)


def _and_mean(values: torch.Tensor) -> torch.Tensor:
    """A row more, [rows + 1, ...]: the mean of those that are known, for a sequence of which nothing is."""
    return torch.cat((values, values.nanmean(0, keepdim=True)))
