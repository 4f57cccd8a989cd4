"""Checks and measures on this machine's GPU what the project says of GPUs; gpu_check.sh runs it.

Each part runs in processes of its own: one that fails costs the others nothing, and leaves no memory behind. A figure
is a median. Kernels and draft steps are compared within one process; a whole server, with drafts and without, is one
process and another. What did not run is reported as not measured.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

SCRIPTS = Path(__file__).parent
KERNELS = SCRIPTS.parent / "tests/kernels"
console = Console(highlight=False)

PARTS = {
    "exit_head": [],
    "model": [],
    "off": [],
    "del": [],
    "lossless": [],
    # They run here: there is no need to compile them for other GPUs.
    "kernels": [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"--ignore={KERNELS / 'test_compiled.py'}", str(KERNELS)),
    ],
    "even": [],
    "waits": [],
}
"""What is run, in this order. Where nothing stands, it is the function of gpu_parts.py of this name."""

LONGEST = {"exit_head": 75.0, "model": 75.0, "off": 100.0, "del": 130.0, "lossless": 90.0, "kernels": 80.0}
"""Seconds, of parts that others must not wait for: what comes last has what is left."""


def run(part: str, given: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The part's figures, and how it ended."""
    begin = time.perf_counter()
    command = PARTS[part] or [sys.executable, str(SCRIPTS / "gpu_parts.py"), part, json.dumps(given)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, errors = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            # With all that it started, which would keep the GPU's memory from the next part.
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
            return {"ended": f"stopped after {seconds:.0f} s", "output": out[-4000:] + errors[-4000:]}
        except BaseException:
            # A signal, which the part, in a group of its own, did not get.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    found: dict[str, Any] = {"ended": "passed" if process.returncode == 0 else f"failed with {process.returncode}"}
    lines = out.strip().splitlines() or [""]
    if not PARTS[part] and process.returncode == 0:
        found |= json.loads(lines[-1])
    else:
        found["output"] = lines[-1] if process.returncode == 0 else (out + errors)[-4000:]
    return found | {"seconds": round(time.perf_counter() - begin, 1)}


def compared(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was asked for, what was measured and whether it is reached."""
    rows: list[tuple[str, str, str]] = []

    def add(what: str, value: float | None, limit: float, most: bool = False) -> None:
        if value is None:
            rows.append((what, "not measured", ""))
            return
        reached = value <= limit if most else value >= limit
        sign = "at most" if most else "at least"
        rows.append((what, f"{value:.3f}", f"{'yes' if reached else 'NO'}, {sign} {limit}"))

    for part in ("kernels", "lossless", "even"):
        rows.append((part, found.get(part, {}).get("ended", "not run"), ""))
    if "float32_apart" in found.get("lossless", {}):
        add("lossless in float32: texts apart, at near-ties", len(found["lossless"]["float32_apart"]), 0, most=True)
    waits = found.get("waits", {}).get("waits")
    add("waits for the device while drafting: places", None if waits is None else len(waits), 0, most=True)
    head = found.get("exit_head", {})
    for count, of in head.get("rows", {}).items():
        add(f"exit_head, {count} rows: share of copy bandwidth", of["share_of_bandwidth"], 0.85)
        add(f"exit_head, {count} rows: times the better of torch's", of["over_torch"], 1.2)
        add(f"exit_head, {count} rows: time with a 32k shortlist", of["shortlist_over_whole"], 0.3, most=True)
        add(f"exit_head, {count} rows: time with the head in FP8", of.get("fp8_over_whole"), 0.6, most=True)
    with_del, off = found.get("del", {}), found.get("off", {})
    add("planning for 256 rows, of a verification", with_del.get("planning_over_verification"), 0.01, most=True)
    for count, over in with_del.get("draft_step_over_bytes", {}).items():
        add(f"draft step, {count} rows: time over bytes / bandwidth", over, 1.15, most=True)
    speed_ups = {
        name: rate / off["tokens_per_second"][name]
        for name, rate in with_del.get("tokens_per_second", {}).items()
        if name in off.get("tokens_per_second", {})
    }
    for name, least in (("0.9 x1", 2.0), ("0.8 x1", 1.5)):
        add(f"8B, agreement {name}: speed-up", speed_ups.get(name), least)
    curve = [value for name, value in speed_ups.items() if name.startswith("0.8")]
    add("8B, agreement 0.8: least speed-up of all batches", min(curve, default=None), 0.98)
    nothing, base = with_del.get("nothing_drafted"), off.get("tokens_per_second", {}).get("0.8 x1")
    add("nothing drafted: speed-up", nothing / base if nothing and base else None, 0.99)
    beyond = with_del.get("kv_cache_bytes")
    if beyond is not None and "kv_cache_bytes" in off:
        add("memory beyond off, of the model", (off["kv_cache_bytes"] - beyond) / with_del["model_bytes"], 0.02, True)
    return rows


def main(
    out: Annotated[Path, typer.Option(help="The results, as JSON.")] = Path("gpu_check.json"),
    parts: Annotated[str, typer.Option(help="Which parts to run.")] = ",".join(PARTS),
    shape: Annotated[str, typer.Option(help="Of the model, see synthetic.py.")] = "8b",
    exit: Annotated[int, typer.Option(help="The exit whose agreement is chosen.")] = 8,
    batches: Annotated[str, typer.Option(help="Sequences at a time.")] = "1,2,4,8,16,32,64,128",
    folder: Annotated[Path, typer.Option(help="Where models are made; kept.")] = Path("/tmp/vllm-del-gpu-check"),
    limit: Annotated[float, typer.Option(help="Seconds for all of it.")] = 570,
    texts: Annotated[int, typer.Option(help="Of each kind, to compare word by word.")] = 24,
    tokens: Annotated[int, typer.Option(help="Of each sequence.")] = 128,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing, and record no graphs.")] = False,
) -> None:
    """Kernel tests compiled, losslessness with CUDA graphs, and the benchmarks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end = time.perf_counter() + limit
    given = {
        "folder": str(folder),
        "shape": shape,
        "exit": exit,
        "batches": [int(number) for number in batches.split(",")],
        "texts": texts,
        "tokens": tokens,
        "engine": {"enforce_eager": True} if eager else {},
    }
    found: dict[str, Any] = {"settings": given}
    for part in parts.split(","):
        console.print(f"{part} ...", end=" ")
        found[part] = run(part, given, min(LONGEST.get(part, limit), end - time.perf_counter()))
        console.print(f"{found[part]['ended']}, {found[part].get('seconds', limit)} s")
        out.write_text(json.dumps(found, indent=1))
    table = Table("what", "measured", "reached")
    for row in compared(found):
        table.add_row(*row)
    console.print(table)
    if with_head := found.get("del", {}).get("draft_head"):
        console.print(f"drafts went through: {with_head}")
    console.print(f"all of it in {out}")
    if any(found[part]["ended"] != "passed" for part in parts.split(",")):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
