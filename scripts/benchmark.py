"""Compares dynamic drafting with none and with fixed (exit, length) pairs, side by side in one process.

    python scripts/synthetic.py --shape 1b --out /tmp/s1b --easy 0.92 --hard 0.0 --exit 3
    python scripts/benchmark.py /tmp/s1b --out scripts/results/synthetic-1b-cpu.json
    python scripts/benchmark.py scripts/demo_model --dtype float32 --exits 2,4 --longest 6 --fixed 2:2,4:2,4:4,4:6

All engines are started first and take turns with every workload, short ones and each time another first, so that a
machine that is slower for a while is slower for all of them. Each is kept full, as a busy server is: as one sequence
ends another begins. Figures are medians over the repeats, and a speed-up is over the turn without drafts of the same
repeat; outputs are compared with those without drafts (in bfloat16 near-ties may differ, and how often is said). The
model is one of `synthetic.py`, whose prompts choose how easy it is, or the demo model, which continues files that it
was not trained on.
"""

import json
import os
import sys
import time
from collections import Counter, deque
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
import vllm
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from workloads import PROMPT_TOKENS, Request, default_workloads, requests_of

from vllm_del.draft.tally import Counts
from vllm_del.engine.measure import machine
from vllm_del.engine.profiling import costs_of_worker
from vllm_del.policy.predict import predict

console = Console(highlight=False)


class Contender:
    """One engine, and what it made of each workload."""

    def __init__(self, name: str, model: str, spec: dict[str, Any] | None, **engine: Any) -> None:
        self.name = name
        self.llm = LLM(
            model,
            speculative_config=spec,
            max_model_len=1024,
            max_num_seqs=16,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **engine,
        )
        # By workload: tokens a second at each repeat, and the texts of the last one.
        self.rates: dict[str, list[float]] = {}
        self.texts: dict[str, list[list[int]]] = {}
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        # What a policy counted, every few rounds.
        self.counts: dict[str, list[Counts]] = {}
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self._count(scheduler)

    def _count(self, scheduler: Any) -> None:
        original, update = scheduler.make_spec_decoding_stats, scheduler.update_from_output

        def counted(stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any) -> Any:
            self.drafted[self.workload] += num_draft_tokens
            self.accepted[self.workload] += num_accepted_tokens
            return original(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        def updated(scheduler_output: Any, model_runner_output: Any) -> Any:
            report = getattr(model_runner_output, "del_report", None)
            if report is not None and report.counts is not None:
                self.counts.setdefault(self.workload, []).append(report.counts)
            return update(scheduler_output, model_runner_output)

        scheduler.make_spec_decoding_stats, scheduler.update_from_output = counted, updated

    def run(self, workload: str, places: int, requests: list[Request], counts: bool) -> None:
        """Serve them once; a first time, which warms up and lets the policy meet the workload, does not count.

        Timed for as long as every place is taken.
        """
        self.workload = workload if counts else ""
        engine, waiting, alive, generated = self.llm.llm_engine, deque(enumerate(requests)), 0, 0
        texts: list[list[int]] = [[] for _ in requests]
        rate, begin = None, time.perf_counter()
        while alive or waiting:
            while waiting and alive < places:
                number, request = waiting.popleft()
                params = SamplingParams(
                    temperature=0,
                    max_tokens=request.length,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.DELTA,
                )
                engine.add_request(str(number), {"prompt_token_ids": request.token_ids}, params)
                alive += 1
            for output in engine.step():
                texts[int(output.request_id)] += output.outputs[0].token_ids
                generated += len(output.outputs[0].token_ids)
                alive -= output.finished
            if rate is None and not waiting and alive < places:
                rate = generated / (time.perf_counter() - begin)
        if counts:
            assert rate is not None
            self.rates.setdefault(workload, []).append(rate)
            self.texts[workload] = texts


def estimates(counts: list[Counts]) -> dict[str, float]:
    """What the policy expected beside what came: of drafts that were tried, and of the time of rounds."""
    tried = sum(sum(of.tried) for of in counts)
    timed = [of for of in counts if of.measured_seconds]
    found = {}
    if tried:
        found["acceptance_expected"] = round(sum(sum(of.expected) for of in counts) / tried, 3)
        found["acceptance"] = round(sum(sum(of.accepted) for of in counts) / tried, 3)
    if timed:
        found["round_time_planned_over_measured"] = round(
            median(of.planned_seconds / of.measured_seconds for of in timed), 3
        )
    return found


def allowed(dynamic: Contender, workload: str, about: dict[str, Any], exits: list[int], tokens: int) -> float | None:
    """The speed-up that measured costs and the model's agreement allow; of a workload whose sequences are alike."""
    kind, number = workload.split(" x")
    agreement = about.get("agreement_by_exit", {}).get(kind)
    if agreement is None or any(str(depth) not in agreement for depth in exits):
        return None
    (costs,) = dynamic.llm.collective_rpc(costs_of_worker)
    rates = [agreement[str(depth)] for depth in exits]
    longest = dynamic.llm.llm_engine.vllm_config.num_speculative_tokens
    return predict(costs, exits, rates, longest, int(number), PROMPT_TOKENS + tokens // 2).speed_up


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint of scripts/synthetic.py, or scripts/demo_model.")],
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    exits: Annotated[str, typer.Option(help="Depths for the dynamic policy.")] = "3,5,8",
    longest: Annotated[int, typer.Option(help="Its largest draft.")] = 8,
    fixed: Annotated[str, typer.Option(help="Fixed exit:length pairs.")] = "3:2,3:4,3:6,3:8,5:4,8:2",
    workloads: Annotated[str, typer.Option(help="What to generate, see workloads.py.")] = "",
    tokens: Annotated[int, typer.Option(help="For each sequence, more or less.")] = 96,
    repeats: int = 6,
    dtype: str = "bfloat16",
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing.")] = False,
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
    names = (workloads or default_workloads(model)).split(",")
    about = json.loads((model / "synthetic.json").read_text()) if (model / "synthetic.json").exists() else {}
    found: dict[str, Any] = {}
    results = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("vllm-del", "torch")} | {"vllm": vllm.__version__},
        "model": about or model.name,
        "settings": {"dtype": dtype, "tokens": tokens, "repeats": repeats, "exits": exits, "longest": longest},
        "workloads": found,
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Starting", total=len(specs) * (1 + len(names) * (1 + repeats)))
        contenders = []
        for name, spec in specs.items():
            contenders.append(Contender(name, str(model), spec, dtype=dtype, enforce_eager=eager))
            bar.update(task, advance=1, description=f"Started {name}")
        for workload in names:
            places, requests = requests_of(workload, model, vocab_size, tokens)
            for repeat in range(1 + repeats):
                first = repeat % len(contenders)
                for contender in contenders[first:] + contenders[:first]:
                    contender.run(workload, places, requests, counts=repeat > 0)
                    bar.update(task, advance=1, description=f"{workload}: {contender.name}")
            found[workload] = compare(workload, contenders)
            dynamic = contenders[1]
            found[workload]["dynamic"] |= estimates(dynamic.counts.get(workload, []))
            found[workload]["allowed"] = allowed(dynamic, workload, about, list(map(int, exits.split(","))), tokens)
            show(workload, found[workload])
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n")


def compare(workload: str, contenders: list[Contender]) -> dict[str, Any]:
    """Each contender's figures; the first one drafts nothing."""
    off = contenders[0]
    found = {}
    for contender in contenders:
        rates, texts = contender.rates[workload], contender.texts[workload]
        same = sum(a == b for a, b in zip(texts, off.texts[workload], strict=True))
        drafted = contender.drafted[workload]
        found[contender.name] = {
            "tokens_per_second": round(median(rates), 1),
            "speed_up": round(median(a / b for a, b in zip(rates, off.rates[workload], strict=True)), 3),
            "fastest_to_slowest": round(max(rates) / min(rates), 2),
            "accepted_of_drafted": round(contender.accepted[workload] / drafted, 3) if drafted else None,
            "drafted_a_token": round(drafted / (len(rates) * sum(map(len, texts))), 2),
            "same_output": f"{same} of {len(texts)}",
        }
    return found


def show(workload: str, found: dict[str, Any]) -> None:
    """One table of all contenders."""
    table = Table("", "tokens/s", "speed-up", "accepted of drafted", title=workload, title_justify="left")
    for name, of in found.items():
        if isinstance(of, dict):
            shown = (of["tokens_per_second"], of["speed_up"], of["accepted_of_drafted"] or "")
            table.add_row(name, *map(str, shown))
    if found["allowed"]:
        table.add_row("costs and agreement allow", "", f"{found['allowed']:.3f}", "")
    console.print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
