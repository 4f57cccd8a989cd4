"""What scheduler, workers and loggers tell each other beside what vLLM carries, attached to the outputs it passes."""

from dataclasses import dataclass, field

from vllm_del.draft.tally import Counts

STATISTICS_KEY = "vllm_del"
"""Under which counts go with vLLM's statistics, in the field for a KV connector's: `del` serves no KV connector."""


@dataclass
class Allowance:
    """With a step, by request id; who is not named may draft the most there is."""

    # the longest draft that the request allows, and the longest there is room for in this step
    wished: dict[str, int] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)
    # how many drafts the next step verifies; `None` if it takes as many as were made
    verified: dict[str, int] | None = None

    def may_draft(self, num_rows: int) -> int:
        """How many of so many sequences there is room for a draft of."""
        return num_rows - sum(not longest for longest in self.longest.values())


@dataclass
class Report:
    """With a step's output."""

    # by request id, how long a draft the policy wants to make; `None` for as last time
    wanted: dict[str, int] | None = None
    # if some are due
    counts: Counts | None = None
