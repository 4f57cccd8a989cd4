"""DEL's rules for one sequence in plain Python: from the paper's formulas, sharing nothing with the package."""

from dataclasses import dataclass, field


@dataclass
class Oracle:
    """Shadow-token statistics, the choice by tokens per layer and the stopping threshold (arXiv 2504.05598)."""

    depths: list[int]
    num_layers: int
    max_length: int
    decay: float = 0.95
    matches: list[float] = field(init=False)
    mismatches: list[float] = field(init=False)
    match_confidence: list[float] = field(init=False)
    mismatch_confidence: list[float] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("matches", "mismatches", "match_confidence", "mismatch_confidence"):
            setattr(self, name, [0.0] * len(self.depths))

    def observe(
        self,
        current: int,
        prompt: list[list[tuple[bool, float]]],
        positions: list[list[tuple[bool, float]]],
    ) -> int:
        """One round, by position and exit: (whether the shadow token is the target's, its confidence).

        `prompt` counts whole; of `positions`, those up to the first at which the current exit is wrong. Returns how
        many drafts that exit got accepted.
        """
        kept = []
        for position in positions:
            kept.append(position)
            if not position[current][0]:
                break
        for exit_ in range(len(self.depths)):
            totals = [0.0, 0.0, 0.0, 0.0]
            for position in prompt + kept:
                match, confidence = position[exit_]
                totals[0 if match else 1] += 1
                totals[2 if match else 3] += confidence
            self.matches[exit_] = self.decay * self.matches[exit_] + totals[0]
            self.mismatches[exit_] = self.decay * self.mismatches[exit_] + totals[1]
            self.match_confidence[exit_] = self.decay * self.match_confidence[exit_] + totals[2]
            self.mismatch_confidence[exit_] = self.decay * self.mismatch_confidence[exit_] + totals[3]
        return len(kept) - 1

    def choose(self) -> tuple[int, int]:
        """Exit and length of the most tokens per layer."""
        best, choice = float("-inf"), (0, 0)
        for exit_, depth in enumerate(self.depths):
            seen = self.matches[exit_] + self.mismatches[exit_]
            if seen == 0:
                continue
            rate = self.matches[exit_] / seen
            tokens = 1.0
            for length in range(self.max_length + 1):
                value = tokens / (length * depth + self.num_layers)
                if value > best:
                    best, choice = value, (exit_, length)
                tokens = 1.0 + rate * tokens
        return choice

    def threshold(self, exit_: int) -> float | None:
        """Below this confidence a draft stops; None while it cannot be said."""
        if not self.matches[exit_] or not self.mismatches[exit_]:
            return None
        of_matches = self.match_confidence[exit_] / self.matches[exit_]
        of_mismatches = self.mismatch_confidence[exit_] / self.mismatches[exit_]
        return (of_matches + of_mismatches) / 2
