"""Compares dynamic drafting with none and with every fixed (exit, length), side by side in one process.

    python scripts/synthetic.py --shape 1b --out /tmp/s1b --easy 0.92 --hard 0.0 --exit 3
    python scripts/benchmark.py /tmp/s1b --out scripts/results/synthetic-1b-cpu.json

All engines are started first and take turns with every workload, so that a machine that is slower for a while is slower
for all of them. Figures are medians over the repeats; outputs are compared with those without drafts (in bfloat16
near-ties may differ, and how often is said). The model is one of `synthetic.py`, whose prompts choose how easy it is.
"""

import json
import os
import random
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

# Read when vLLM is imported: engines side by side in this process, on all its cores.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from synthetic import tokens_of
from vllm import LLM, SamplingParams

from vllm_del.engine.measure import machine

WORKLOADS = "easy x1,easy x4,easy x8,hard x1,hard x2,hard x4,hard x8,hard x16,mixed x4,mixed x8"
CLASSES = {"easy": ["easy"], "hard": ["hard"], "mixed": ["easy", "hard", "turning easy", "turning hard"]}
PROMPT_TOKENS = 32

console = Console(highlight=False)


class Contender:
    """One engine, and what it made of each workload."""

    def __init__(self, name: str, model: str, spec: dict[str, Any] | None, dtype: str) -> None:
        self.name = name
        self.llm = LLM(
            model,
            speculative_config=spec,
            dtype=dtype,
            max_model_len=1024,
            max_num_seqs=16,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.seconds: dict[str, list[float]] = {}
        self.texts: dict[str, list[tuple[int, ...]]] = {}
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self._count(scheduler)

    def _count(self, scheduler: Any) -> None:
        original = scheduler.make_spec_decoding_stats

        def counted(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any) -> Any:
            self.drafted[self.workload] += num_draft_tokens
            self.accepted[self.workload] += num_accepted_tokens
            return original(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        scheduler.make_spec_decoding_stats = counted

    def run(self, workload: str, prompts: list[dict[str, list[int]]], tokens: int, counts: bool) -> None:
        """Generate once; a first time, which warms up and lets the policy meet the workload, does not count."""
        self.workload = workload if counts else ""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        if counts:
            self.seconds.setdefault(workload, []).append(seconds)
            self.texts[workload] = [tuple(output.outputs[0].token_ids) for output in outputs]


def prompts_of(workload: str, vocab_size: int, rng: random.Random) -> list[dict[str, list[int]]]:
    """ "mixed x4": four prompts, of its classes in turn."""
    kind, number = workload.split(" x")
    names = CLASSES[kind]
    return [
        {"prompt_token_ids": rng.choices(list(tokens_of(vocab_size, names[i % len(names)])), k=PROMPT_TOKENS)}
        for i in range(int(number))
    ]


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint of scripts/synthetic.py.")],
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    exits: Annotated[str, typer.Option(help="Depths for the dynamic policy.")] = "3,5,8",
    longest: Annotated[int, typer.Option(help="Its largest draft.")] = 8,
    fixed: Annotated[str, typer.Option(help="Fixed exit:length pairs.")] = "3:2,3:4,3:6,3:8,5:4,8:2",
    workloads: Annotated[str, typer.Option(help="What to generate.")] = WORKLOADS,
    tokens: Annotated[int, typer.Option(help="For each sequence.")] = 96,
    repeats: int = 3,
    dtype: str = "bfloat16",
) -> None:
    """Tokens per second of every contender on every workload."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    specs: dict[str, dict[str, Any] | None] = {
        "off": None,
        "dynamic": {"method": "del", "del_exit_layers": exits, "num_speculative_tokens": longest},
    }
    for pair in filter(None, fixed.split(",")):
        depth, length = map(int, pair.split(":"))
        fields = {"method": "del", "del_policy": "fixed", "del_exit_layers": depth, "num_speculative_tokens": length}
        specs[f"fixed {depth}:{length}"] = fields
    names = workloads.split(",")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Starting", total=len(specs) * (1 + len(names) * (1 + repeats)))
        contenders = []
        for name, spec in specs.items():
            contenders.append(Contender(name, str(model), spec, dtype))
            bar.update(task, advance=1, description=f"Started {name}")
        for workload in names:
            prompts = prompts_of(workload, vocab_size, random.Random(0))
            for repeat in range(1 + repeats):
                for contender in contenders:
                    contender.run(workload, prompts, tokens, counts=repeat > 0)
                    bar.update(task, advance=1, description=f"{workload}: {contender.name}")
            found = _of(workload, contenders, tokens)
            ups = ", ".join(f"{name} {of['speed_up']:.2f}" for name, of in found.items() if name != "off")
            console.print(f"{workload}: off {found['off']['tokens_per_second']:.1f} tokens/s; {ups}")
    results = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("vllm-del", "torch")} | {"vllm": _vllm_version()},
        "model": json.loads((model / "synthetic.json").read_text()) if (model / "synthetic.json").exists() else {},
        "settings": {"dtype": dtype, "tokens": tokens, "repeats": repeats, "exits": exits, "longest": longest},
        "workloads": {workload: _of(workload, contenders, tokens) for workload in names},
    }
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def _of(workload: str, contenders: list[Contender], tokens: int) -> dict[str, Any]:
    off = contenders[0]
    sequences = len(off.texts[workload])
    found = {}
    for contender in contenders:
        seconds = contender.seconds[workload]
        same = sum(a == b for a, b in zip(contender.texts[workload], off.texts[workload], strict=True))
        drafted = contender.drafted[workload]
        found[contender.name] = {
            "tokens_per_second": round(sequences * tokens / median(seconds), 1),
            "speed_up": round(median(off.seconds[workload]) / median(seconds), 3),
            "slowest_to_fastest": round(max(seconds) / min(seconds), 2),
            "accepted_of_drafted": round(contender.accepted[workload] / drafted, 3) if drafted else None,
            "drafted_a_token": round(drafted / (len(seconds) * sequences * tokens), 2),
            "same_output": f"{same} of {sequences}",
        }
    return found


def show(results: dict[str, Any]) -> None:
    """The table."""
    contenders = list(next(iter(results["workloads"].values())))
    table = Table("workload", "off tok/s", *contenders[1:], title=f"Speed-up over off; {results['machine']}")
    for workload, found in results["workloads"].items():
        ups = [f"{found[name]['speed_up']:.2f}" for name in contenders[1:]]
        table.add_row(workload, f"{found['off']['tokens_per_second']:.1f}", *ups)
    console.print(table)


def _vllm_version() -> str:
    import vllm

    return vllm.__version__


if __name__ == "__main__":
    sys.exit(typer.run(main))
