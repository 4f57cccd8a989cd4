"""Compares dynamic drafting with none and with fixed (exit, length) pairs, side by side in one process.

    python scripts/synthetic.py --shape 1b --out /tmp/s1b --easy 0.92 --hard 0.0 --exit 3
    python scripts/benchmark.py /tmp/s1b --out scripts/results/synthetic-1b-cpu.json
    python scripts/benchmark.py scripts/demo_model --dtype float32 --exits 2,4 --longest 6

All engines are started first, and contenders go through every workload side by side, some tokens each at a time, so
that a machine that is slower for a while is slower for all of them. Two engines draft nothing, and what is between them
is noise. An engine is kept full, as a busy server is: as one sequence ends another begins. Every turn has texts of its
own, the same ones for all. Fixed pairs are many, and those of one exit share an engine: each runs heats beside one of
every other exit and no drafts, and the best of every exit the final, which alone counts; the best of these is compared
with. That flatters it a little, and heats may miss the very best length. The dynamic policy goes on from one workload
to the next with what it has learnt, as in a server. Outputs are compared with those without drafts (in bfloat16
near-ties may differ, and how often is said). The model is one of `synthetic.py`, whose prompts choose how easy it is,
or the demo model, which continues files it was not trained on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from contenders import Contender, Engine, take_turns
from expected import allowed, estimates
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from vllm import __version__ as vllm_version
from workloads import default_workloads, requests_of

from vllm_del.engine.measure import machine
from vllm_del.engine.profiling import costs_of_worker

console = Console(highlight=False)


def commit() -> str:
    """Of this repository, and whether what runs is something else: "d974d3c", "d974d3c-dirty"; "" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def pairs_of(fixed: str, longest: int) -> dict[int, list[int]]:
    """Lengths by exit: "3,5:2,5:4" is every length at exit 3, and two at exit 5; "" is none."""
    pairs: dict[int, list[int]] = {}
    for pair in filter(None, fixed.split(",")):
        depth, _, length = pair.partition(":")
        pairs.setdefault(int(depth), []).extend([int(length)] if length else range(1, longest + 1))
    return pairs


def compete(
    # no drafts, none again, and dynamic
    bases: list[Contender],
    # by exit
    pairs: list[list[Contender]],
    heats: int,
    repeats: int,
    # tokens of a sequence, in heats and in the final
    tokens: tuple[int, int],
    # the turns of these numbers, with so many tokens
    play: Callable[[list[Contender], range, int], None],
) -> dict[str, Any]:
    """Heats and final of one workload."""
    (short, whole), (off, _, dynamic) = tokens, bases
    # Warms up every engine, and lets the policy meet the workload.
    play([contender.anew() for contender in (*bases, *(of_exit[0] for of_exit in pairs))], range(1), short)
    in_heats: dict[str, float] = {}
    for of_heat in zip_longest(*pairs):
        beside, *heat = [contender.anew() for contender in (off, *filter(None, of_heat))]
        play([beside, *heat], range(1, 1 + heats), short)
        in_heats |= {pair.name: round(pair.rate / beside.rate, 3) for pair in heat}
    best = [max(of_exit, key=lambda pair: in_heats[pair.name]).anew() for of_exit in pairs]
    dynamic.engine.counts.clear()
    final = [*bases, *best]
    play(final, range(1 + heats, 1 + heats + repeats), whole)
    found: dict[str, Any] = {contender.name: contender.figures(off) for contender in final}
    found["dynamic"] |= estimates(dynamic.engine.counts)
    if best:
        found["dynamic_over_best_fixed"] = round(dynamic.rate / max(pair.rate for pair in best), 3)
    return found | {"heats": in_heats}


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint of scripts/synthetic.py, or scripts/demo_model.")],
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    exits: Annotated[str, typer.Option(help="Depths for the dynamic policy.")] = "3,5,8",
    longest: Annotated[int, typer.Option(help="Its largest draft.")] = 8,
    fixed: Annotated[
        str | None,
        typer.Option(help='Fixed pairs exit:length, or exits with every length; "" for none. By default all.'),
    ] = None,
    workloads: Annotated[str, typer.Option(help="What to generate, see workloads.py.")] = "",
    tokens: Annotated[int, typer.Option(help="For each sequence, more or less.")] = 96,
    heat_tokens: Annotated[int, typer.Option(help="And in heats.")] = 48,
    heats: Annotated[int, typer.Option(help="Turns of every fixed pair.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Turns of the final.")] = 10,
    dtype: str = "bfloat16",
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing.")] = False,
) -> None:
    """Tokens per second of every contender on every workload."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    fixed = exits if fixed is None else fixed
    pairs = pairs_of(fixed, longest)
    specs: dict[str, dict[str, Any] | None] = {
        "off": None,
        "off again": None,
        "dynamic": {"method": "del", "del_exit_layers": exits, "num_speculative_tokens": longest},
    }
    # One engine for an exit: requests say how long their drafts are.
    for depth, lengths in pairs.items():
        fields = {"method": "del", "del_policy": "fixed", "del_exit_layers": depth}
        specs[f"exit {depth}"] = fields | {"num_speculative_tokens": max(lengths)}
    names = (workloads or default_workloads(model)).split(",")
    about = json.loads((model / "synthetic.json").read_text()) if (model / "synthetic.json").exists() else {}
    settings = {
        "dtype": dtype,
        "eager": eager,
        "tokens": tokens,
        "heat_tokens": heat_tokens,
        "exits": exits,
        "longest": longest,
        "fixed": fixed,
        "heats": heats,
        "repeats": repeats,
    }
    found: dict[str, Any] = {}
    results = {
        "machine": machine(),
        # With `glibc.malloc.hugetlb=1` all engines have their weights in huge pages, where Linux has some.
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "commit": commit(),
        "versions": {name: version(name) for name in ("vllm-del", "torch")} | {"vllm": vllm_version},
        "model": about or model.name,
        "settings": settings,
        "workloads": found,
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        in_heats = sum(map(len, pairs.values())) + max(map(len, pairs.values()), default=0)
        num_turns = len(specs) + heats * in_heats + repeats * len(specs)
        task = bar.add_task("Starting", total=len(specs) + len(names) * num_turns)
        engines: dict[str, Engine] = {}
        for name, spec in specs.items():
            engines[name] = Engine(str(model), spec, dtype=dtype, enforce_eager=eager)
            bar.update(task, advance=1, description=f"Started {name}")
        (costs,) = engines["dynamic"].llm.collective_rpc(costs_of_worker)
        results["costs"] = asdict(costs)
        for workload in names:

            def play(contenders: list[Contender], turns: range, tokens: int, workload: str = workload) -> None:
                def tell(whose: Contender) -> None:
                    bar.update(task, advance=1, description=f"{workload}: {whose.name}")

                take_turns(contenders, (requests_of(workload, model, vocab_size, tokens, turn) for turn in turns), tell)

            by_exit = [[Contender(f"fixed {e}:{n}", engines[f"exit {e}"], n) for n in pairs[e]] for e in pairs]
            bases = [Contender(name, engines[name], longest) for name in ("off", "off again", "dynamic")]
            of = compete(bases, by_exit, heats, repeats, (heat_tokens, tokens), play)
            found[workload] = of
            depths = list(map(int, exits.split(",")))
            counts = engines["dynamic"].counts
            dynamic = bases[-1]
            assert dynamic.correction is not None
            of["correction"] = asdict(dynamic.correction)
            of |= allowed(costs, dynamic.correction, counts, workload, about, depths, longest, tokens)
            show(workload, of)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(results, indent=1) + "\n")


def show(workload: str, found: dict[str, Any]) -> None:
    """One table of all contenders."""
    table = Table("", "tokens/s", "speed-up", "accepted of drafted", title=workload, title_justify="left")
    for name, of in found.items():
        if isinstance(of, dict) and "speed_up" in of:
            shown = (of["tokens_per_second"], of["speed_up"], of["accepted_of_drafted"] or "")
            table.add_row(name, *map(str, shown))
    if found["allowed"]:
        table.add_row("costs and acceptance allow", "", f"{found['allowed']:.3f}", "")
    for name, speed_up in found["heats"].items():
        table.add_row(f"{name}, in heats", "", str(speed_up), "")
    console.print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
