"""The tokens that drafts are chosen from, where these are not all: those that were generated most often.

A large part of a draft step is the LM head, and most of a vocabulary is hardly ever said: a head that reads the rows
of the common tokens alone is cheaper. A token that is missing is not drafted, and verification says it all the same.
The idea is FR-Spec's (arXiv 2502.14856), which counts a corpus beforehand.
"""

from collections.abc import Callable, Sequence

import torch

from vllm_del.draft.verified import Verified

FIRST, LONGEST = 256, 65536
"""The list is made anew after so many rounds of a sequence, then after twice as many, and so on up to the most."""

FADING = 0.5
"""What is left of the counts then: what is said now counts for more than what was said long ago."""


class DraftVocabulary:
    """The `tokens` of which drafts are made, [size] int64 ascending: always the same tensor, as graphs read it.

    Given, or counted: then the first ones of the vocabulary are taken before anything was generated, and to fill up.
    In vocabularies made by merging pairs, and in those sorted by score, these are the common ones.
    """

    def __init__(
        self,
        # how many, or which
        listed: int | Sequence[int],
        # in all
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self.is_counted = isinstance(listed, int)
        self.tokens = torch.tensor(range(listed) if isinstance(listed, int) else sorted(set(listed)), device=device)
        self._counts = torch.zeros(num_tokens, device=device)
        # Less than any count that has not faded away.
        self._rank = torch.linspace(FADING**10, 0, num_tokens, device=device)
        self._interval = self._left = FIRST
        self._followers: list[Callable[[], None]] = []

    def follow(self, renew: Callable[[], None]) -> None:
        """Call `renew` now, and whenever the tokens are others."""
        self._followers.append(renew)
        renew()

    def observe(self, verified: Verified) -> None:
        """Count what was generated, where tokens are counted. When they are listed anew the host knows by itself: it
        waits for nothing."""
        step = torch.arange(verified.longest + 1, device=self.tokens.device)
        accepted = verified.accepted.unsqueeze(1)
        # What is not counted may lie anywhere.
        at = (verified.start.unsqueeze(1) + 1 + step).clamp_max(len(verified.input_ids) - 1)
        tokens = torch.where(step < accepted, verified.input_ids[at], verified.next_token.unsqueeze(1)).long()
        generated = (step <= accepted) & verified.sampled.unsqueeze(1)
        inside = tokens.clamp(0, len(self._counts) - 1)
        self._counts.index_add_(0, inside.flatten(), generated.flatten().float())
        self._left -= len(verified.accepted)
        if self._left <= 0:
            self._left = self._interval = min(2 * self._interval, LONGEST)
            self._renew()

    def _renew(self) -> None:
        common = (self._counts + self._rank).topk(len(self.tokens)).indices
        self.tokens.copy_(common.sort().values)
        self._counts.mul_(FADING)
        for renew in self._followers:
            renew()
