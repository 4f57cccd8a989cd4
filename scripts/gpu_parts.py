"""The parts of gpu_check.py: `python gpu_parts.py PART SETTINGS` prints the figures of one, the last line, in JSON."""

import inspect
import json
import os
import random
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
# Attention in float32 is Triton's, which else rounds to 10 bits: nothing could be compared word by word.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
if sys.argv[1:2] == ["waits"]:
    os.environ.setdefault("VLLM_GPU_SYNC_CHECK", "warn")

import torch
from gpu_kernels import DEVICE, ROWS, copy_bandwidth, exit_head
from synthetic import tokens_of

# Where this is tried out on a CPU: vLLM 0.32's attention in bfloat16 uses the tiles of AMX, for which a process has to
# ask, and dies where nothing asked before, as with matrices too small for oneDNN to take them.
torch.cpu._init_amx()
PROMPT_TOKENS = 32
AGREEMENTS = {"0.9": "easy", "0.8": "hard"}
"""The model's two classes of tokens, by how often the chosen exit agrees."""
PLANNED_ROWS = 256
NEAR_TIE = {"float32": 1e-3, "bfloat16": 1.0}
"""Two tokens whose log-probabilities differ by less may change places: in bfloat16 four steps of it at logits of 32 to
64, which these models have; in float32 what sums in another order come to, as other kernels verify than decode."""

SMALL = {
    "max_num_seqs": 64,
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "gpu_memory_utilization": 0.02,
    "kv_cache_memory_bytes": 1 << 28,
}
"""Of engines for a small model, of which several live side by side and are to be up soon."""


def lossless(given: dict[str, Any], dtypes: Sequence[str] = ("float32", "bfloat16"), **more: Any) -> dict[str, Any]:
    """Greedy texts with drafts beside those without: the same but for near-ties, which in float32 are hardly any."""
    model = made(Path(given["folder"]), "tiny", 2)
    prompts = [prompt for name in AGREEMENTS for prompt in prompts_of(model, name, given["texts"])]
    found: dict[str, Any] = {}
    # One that is gone takes with it what others in this process need.
    engines = []
    for dtype in dtypes:
        texts = []
        # By layers, not by time: for a model as small drafts may not pay.
        fields = {"del_objective": "tpl", "del_exit_layers": [2, 4], "num_speculative_tokens": 6}
        # The model's own, which is tuned for each type.
        fields |= {"del_draft_head": "model"}
        for spec in (None, {"method": "del", **fields}):
            options = SMALL | given.get("engine", {})
            llm = engine(model, spec, dtype=dtype, **options, **more)
            engines.append(llm)
            texts.append([output.outputs[0] for output in generate(llm, prompts, given["tokens"], logprobs=5)])
        found[f"{dtype}_drafted"] = accepted(llm)
        assert found[f"{dtype}_drafted"] > 0, "nothing was drafted: there is nothing to see"
        (found[f"{dtype}_graphs"],) = llm.collective_rpc(_num_graphs)
        (found[f"{dtype}_verified_by"],) = llm.collective_rpc(_graphs_of_verifications)
        assert found[f"{dtype}_graphs"] > 0 or DEVICE == "cpu" or "enforce_eager" in options, "no draft step is a graph"
        apart = [near_tie(off, on, dtype) for off, on in zip(*texts, strict=True) if off.token_ids != on.token_ids]
        found[f"{dtype}_texts"], found[f"{dtype}_apart"] = len(prompts), apart
        assert all(difference is not None for difference in apart), (
            f"a text differs in {dtype} where there is no near-tie: {apart}"
        )
    return found


def even(given: dict[str, Any]) -> dict[str, Any]:
    """The same with FlashAttention 2, which replays no graph for rows of different lengths."""
    attention = {"backend": "FLASH_ATTN", "flash_attn_version": 2} if DEVICE == "cuda" else None
    found = lossless(given, ("bfloat16",), attention_config=attention)
    kind = found["bfloat16_verified_by"]
    assert kind == "EvenGraphs" or DEVICE == "cpu" or "enforce_eager" in given["engine"], f"{kind}: not what is meant"
    return found


def waits(given: dict[str, Any]) -> dict[str, Any]:
    """Where steps that draft wait for the device, by vLLM's own check, which sees operations and copies, no events."""
    model, seen, engines = made(Path(given["folder"]), "tiny", 2), watched_waits(), []
    prompts = [prompt for name in AGREEMENTS for prompt in prompts_of(model, name, given["texts"])]
    for objective in ("tpl", "goodput"):
        spec = {"method": "del", "del_objective": objective, "del_exit_layers": [2, 4], "num_speculative_tokens": 6}
        llm = engine(model, spec, dtype="bfloat16", **SMALL | given.get("engine", {}))
        engines.append(llm)
        generate(llm, prompts, given["tokens"])
        # By time, drafts of a model as small may not pay.
        assert accepted(llm) > 0 or objective == "goodput", "nothing was drafted: there is nothing to see"
    # Those of vLLM's own are no matter of ours; on a CPU nothing is checked.
    mine = sorted(place for place in seen if place.startswith("vllm_del."))
    return {"waits": mine if DEVICE == "cuda" else None, "waits_of_vllm": len(seen) - len(mine)}


def watched_waits() -> set[str]:
    """Where a step waits for the device from now on: the innermost module of ours or vLLM's, and the line."""
    waits: set[str] = set()
    show = warnings.showwarning

    def noted(message: Any, category: Any, *more: Any) -> None:
        if "synchronizing CUDA operation" not in str(message) and "GPU<->CPU sync" not in str(message):
            show(message, category, *more)
            return
        # Not by the warning's own place: vLLM's check stands between us and what copies.
        for frame, line in traceback.walk_stack(inspect.currentframe()):
            module = frame.f_globals.get("__name__", "")
            if module.split(".")[0] in ("vllm", "vllm_del") and not module.endswith("gpu_sync_debug"):
                waits.add(f"{module}:{line}")
                return

    warnings.showwarning = noted
    return waits


def _num_graphs(worker: Any) -> int:
    """In the worker: of draft steps."""
    from vllm_del.engine.patches import drafter_of

    graphs = getattr(drafter_of(worker.model_runner), "graphs", None)
    return len(graphs.graphs) if graphs else 0


def _graphs_of_verifications(worker: Any) -> str:
    """In the worker: of which kind; `EvenGraphs` where attention replays none for rows of different lengths."""
    return type(getattr(worker.model_runner, "cudagraph_manager", None)).__name__


def near_tie(off: Any, on: Any, dtype: str) -> float | None:
    """By how much the target prefers its own token to the other one where two texts part; None if clearly."""
    at = next(i for i, (a, b) in enumerate(zip(off.token_ids, on.token_ids, strict=True)) if a != b)
    known = off.logprobs[at]
    if on.token_ids[at] not in known:
        return None
    difference = known[off.token_ids[at]].logprob - known[on.token_ids[at]].logprob
    return difference if difference < NEAR_TIE[dtype] else None


def model(given: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of the other parts, whose time is then theirs."""
    return {"model": str(made(Path(given["folder"]), given["shape"], given["exit"]))}


def off(given: dict[str, Any]) -> dict[str, Any]:
    """vLLM without drafts."""
    model = made(Path(given["folder"]), given["shape"], given["exit"])
    llm = engine(model, None, **given.get("engine", {}))
    return {"tokens_per_second": rates(llm, model, given), "kv_cache_bytes": kv_cache_bytes(llm)}


def with_drafts(given: dict[str, Any]) -> dict[str, Any]:
    """The same with drafts, and what a draft step takes beside the bytes it reads."""
    model, exit = made(Path(given["folder"]), given["shape"], given["exit"]), given["exit"]
    exits = sorted({max(1, exit // 2), exit, 2 * exit})
    spec = {"method": "del", "del_exit_layers": exits}
    llm = engine(model, spec, **given.get("engine", {}))
    found = {"tokens_per_second": rates(llm, model, given), "accepted": accepted(llm)}
    found["nothing_drafted"] = rate(llm, prompts_of(model, "0.8", 1), given["tokens"], {"del": {"enabled": False}})
    found["kv_cache_bytes"] = kv_cache_bytes(llm)
    ((steps, step_bytes, found["model_bytes"], found["draft_head"]),) = llm.collective_rpc(
        _draft_steps, args=(exits.index(exit) + 1,)
    )
    speed = copy_bandwidth()
    found["draft_step_seconds"] = steps
    found["draft_step_over_bytes"] = {rows: seconds / (step_bytes / speed) for rows, seconds in steps.items()}
    ((found["planning_seconds"], found["planning_over_verification"]),) = llm.collective_rpc(_planning)
    return found


def _planning(worker: Any) -> tuple[float, float]:
    """In the worker: seconds of observing and planning the most rows that are asked for, and what part that is of
    verifying a token each."""
    from vllm_del.engine.measure import planning_seconds
    from vllm_del.engine.patches import drafter_of
    from vllm_del.engine.rehearsal import Rehearsal
    from vllm_del.engine.setup import make_policy

    drafter, times = drafter_of(worker.model_runner), []
    # Another one, as it learns from what it is timed with; it plans each time.
    policy, rehearsal = make_policy(drafter), Rehearsal(drafter)
    policy.pace = None
    rows = min(PLANNED_ROWS, drafter.vllm_config.scheduler_config.max_num_seqs)
    for _ in range(12):
        begin = time.perf_counter()
        by_device = rehearsal.verify(rows, 1, rehearsal.context)
        times.append(time.perf_counter() - begin if by_device is None else by_device)
    planning = planning_seconds(policy, rows, drafter.device)
    return planning, planning / median(times[2:])


def _draft_steps(worker: Any, segments: int) -> tuple[dict[str, float], int, int, str]:
    """In the worker: seconds of a draft step by rows, the bytes of what it reads and of the whole model, the head."""
    from vllm_del.engine.patches import drafter_of
    from vllm_del.engine.rehearsal import Rehearsal

    drafter = drafter_of(worker.model_runner)
    rehearsal, seconds = Rehearsal(drafter), {}
    for rows in ROWS:
        run, times = rehearsal.drafting(rows, segments, rehearsal.context), []
        for _ in range(12):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        seconds[str(rows)] = median(times[2:]) / rehearsal.steps
    target = drafter.model.target
    depth = drafter.speculative_config.exits[segments - 1]
    read = [parameter for layer in drafter.model.layers[:depth] for parameter in layer.parameters()]
    read.append(target.lm_head.weight)
    whole = sum(parameter.nbytes for parameter in target.parameters())
    return seconds, sum(parameter.nbytes for parameter in read), whole, str(drafter.head)


def made(folder: Path, shape: str, exit: int) -> Path:
    """The synthetic checkpoint of this shape, made where it is not there yet."""
    model = folder / f"{shape}-exit-{exit}"
    if not (model / "synthetic.json").exists():
        wanted = [text for name, kind in AGREEMENTS.items() for text in (f"--{kind}", name)]
        script = str(Path(__file__).parent / "synthetic.py")
        options = ["--shape", shape, "--exit", str(exit), "--out", str(model), "--device", DEVICE]
        subprocess.run([sys.executable, script, *wanted, *options], check=True, stdout=sys.stderr)
    return model


def prompts_of(model: Path, agreement: str, number: int) -> list[list[int]]:
    """As many prompts of the class that agrees so often."""
    pool = tokens_of(json.loads((model / "config.json").read_text())["vocab_size"], AGREEMENTS[agreement])
    rng = random.Random(f"{agreement} {number}")
    return [rng.choices(pool, k=PROMPT_TOKENS) for _ in range(number)]


def engine(model: Path, spec: dict[str, Any] | None, **options: Any) -> Any:
    """vLLM as it comes, but for the longest text; with statistics, so that drafts are counted."""
    from vllm import LLM

    if DEVICE == "cpu":
        # There it asks for nearly all that the machine has, and does not start where something else has some of it.
        options.setdefault("gpu_memory_utilization", 0.3)
    return LLM(
        str(model),
        speculative_config=spec,
        max_model_len=1024,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **options,
    )


def generate(llm: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **options)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def rate(llm: Any, prompts: list[list[int]], tokens: int, extra: dict[str, Any] | None = None) -> float:
    """Tokens a second: the median of three runs after one that does not count."""
    seconds: list[float] = []
    while len(seconds) < 4:
        begin = time.perf_counter()
        generate(llm, prompts, tokens, extra_args=extra)
        seconds.append(time.perf_counter() - begin)
    return len(prompts) * tokens / median(seconds[1:])


def rates(llm: Any, model: Path, given: dict[str, Any]) -> dict[str, float]:
    """By agreement and number of sequences."""
    batches = [("0.9", given["batches"][0]), *(("0.8", number) for number in given["batches"])]
    return {
        f"{kind} x{number}": rate(llm, prompts_of(model, kind, number), given["tokens"]) for kind, number in batches
    }


def accepted(llm: Any) -> int:
    """Drafts accepted so far."""
    return sum(
        int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"
    )


def kv_cache_bytes(llm: Any) -> int:
    """What vLLM found room for."""
    (config,) = llm.collective_rpc(_kv_cache_bytes)
    return config


def _kv_cache_bytes(worker: Any) -> int:
    return sum(tensor.size for tensor in worker.model_runner.kv_cache_config.kv_cache_tensors)


if __name__ == "__main__":
    parts = {"exit_head": exit_head, "model": model, "off": off, "del": with_drafts}
    parts |= {"lossless": lossless, "even": even, "waits": waits}
    figures = parts[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps(figures), flush=True)
    # Engines that fall apart at the end would take the figures with them.
    os._exit(0)
