"""The `vllm:del_*` metrics, and a line of the log: what is drafted at which exit, what comes of it, why not more.

Stock metrics (`vllm:spec_decode_*`) are vLLM's and stay as they are; these say what they cannot.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client import Counter

BY_EXIT = {
    "drafted": ("vllm:del_drafted_tokens", "Tokens drafted and verified, by exit layer."),
    "accepted": ("vllm:del_accepted_tokens", "Of these the tokens that verification kept, by exit layer."),
    "tried": (
        "vllm:del_tried_tokens",
        "Drafted tokens that were accepted, or the first of a draft that was not.",
    ),
    "expected": ("vllm:del_expected_accepted_tokens", "Of those tried, how many were expected to be accepted."),
}
LENGTHS = (
    "vllm:del_drafts",
    "Rounds in which a sequence might have drafted, by length of its draft; 0: none.",
)
NOT_DRAFTED = (
    "vllm:del_rounds_without_draft",
    "Rounds of a sequence without a draft. does_not_pay: the policy's choice; no_room: the KV cache is nearly full; "
    "not_wanted: the request said so; ends: it wants no more tokens than verification brings.",
)
PLANNED = ("vllm:del_planned_seconds", "Time that rounds were to take, given what they drafted.")
MEASURED = ("vllm:del_measured_seconds", "Time that these rounds took.")
REASONS = ("does_not_pay", "no_room", "not_wanted", "ends")


class Metrics:
    """Counters of a server; `observe` takes what an engine counted, `log_line` says what it came to since the last.

    `counter`: the class they are of, Prometheus's own or one that is used like it.
    """

    def __init__(
        self,
        model_name: str,
        engines: Sequence[int],
        exits: Sequence[int],
        max_length: int,
        counter: Callable[..., Any] = Counter,
    ) -> None:
        self._exits = exits
        self._since_log: defaultdict[str, float] = defaultdict(float)

        def counters(metric: tuple[str, str], label: str, values: Sequence[Any]) -> dict[int, list[Counter]]:
            family = counter(*metric, labelnames=["model_name", "engine", *([label] if label else [])])
            return {
                engine: [family.labels(model_name, str(engine), *([str(value)] if label else [])) for value in values]
                for engine in engines
            }

        self._by_exit = {name: counters(metric, "exit_layer", exits) for name, metric in BY_EXIT.items()}
        self._lengths = counters(LENGTHS, "length", range(max_length + 1))
        self._reasons = counters(NOT_DRAFTED, "reason", REASONS)
        self._planned, self._measured = counters(PLANNED, "", [""]), counters(MEASURED, "", [""])

    def observe(self, engine: int, counted: Mapping[str, Any]) -> None:
        """`counted`: the reasons that the scheduler counted, and under "counts" the workers' `Counts`, each a dict."""
        reasons = {reason: counted.get(reason, 0) for reason in REASONS}
        self._since_log["not scheduled"] += sum(reasons.values())
        for counts in counted["counts"]:
            for name, counters in self._by_exit.items():
                self._add(name, counters[engine], counts[name])
                for depth, value in zip(self._exits, counts[name], strict=True):
                    self._since_log[f"{name} at {depth}"] += value
            self._add("rounds", self._lengths[engine], counts["lengths"])
            reasons["does_not_pay"] += counts["lengths"][0]
            self._add("planned", self._planned[engine], [counts["planned_seconds"]])
            self._add("measured", self._measured[engine], [counts["measured_seconds"]])
        self._add("without", self._reasons[engine], list(reasons.values()))
        for reason, value in reasons.items():
            self._since_log[reason] += value

    def _add(self, name: str, counters: Sequence[Counter], values: Sequence[float]) -> None:
        for counter, value in zip(counters, values, strict=True):
            if value:
                counter.inc(value)
        self._since_log[name] += sum(values)

    def log_line(self) -> str | None:
        """What happened since the last line, if anything did."""
        seen, self._since_log = self._since_log, defaultdict(float)
        rounds = seen["rounds"] + seen["not scheduled"]
        if not rounds:
            return None
        parts = [f"{(rounds - seen['without']) / rounds:.0%} of rounds drafted"]
        parts += [f"{seen[reason] / rounds:.0%} {reason.replace('_', ' ')}" for reason in REASONS if seen[reason]]
        if seen["drafted"]:
            used = [depth for depth in self._exits if seen[f"drafted at {depth}"]]
            shares = [f"{seen[f'drafted at {depth}'] / seen['drafted']:.0%} after layer {depth}" for depth in used]
            parts.append(f"{seen['drafted'] / (rounds - seen['without']):.1f} tokens a draft ({', '.join(shares)})")
            parts.append(f"{seen['accepted'] / seen['drafted']:.0%} accepted")
            parts.append(f"acceptance rate {seen['accepted'] / seen['tried']:.2f}")
            parts[-1] += f" (expected {seen['expected'] / seen['tried']:.2f})"
        if seen["planned"] and seen["measured"]:
            parts.append(f"rounds took {seen['measured'] / seen['planned']:.2f} of the time planned")
        return "del: " + ", ".join(parts)
