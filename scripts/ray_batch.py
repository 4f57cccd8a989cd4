"""Batches over a Ray cluster: prompts in JSON lines become completions in JSON lines.

    python scripts/ray_batch.py MODEL prompts.jsonl completions --replicas 8

Ray Data's processor for vLLM does the work: it starts an engine for each replica, keeps it busy, and starts it again if
it dies. `del` is one word among the engine's arguments. Every node needs `pip install 'vllm-del[ray]'` beside its vLLM;
the cluster is that of RAY_ADDRESS, or else one of this machine alone.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_SAMPLING = '{"temperature": 0, "max_tokens": 128}'


def main(
    model: Annotated[str, typer.Argument(help="A model as `vllm serve` takes it, to be found on every node.")],
    prompts: Annotated[
        str, typer.Argument(help='JSON lines, or a folder of them: {"prompt": ..., and what you like}.')
    ],
    out: Annotated[
        str, typer.Argument(help="A new folder, for the same lines with `completion`, `tokens` and `error`.")
    ],
    spec: Annotated[str, typer.Option(help="As vLLM's --speculative-config; `off` for no drafts.")] = "del",
    replicas: Annotated[int, typer.Option(help="Engines.", min=1)] = 1,
    sampling: Annotated[str, typer.Option(help="vLLM's SamplingParams, as JSON.")] = DEFAULT_SAMPLING,
    engine_args: Annotated[
        str, typer.Option(help='More of vLLM\'s arguments, as JSON: {"max_model_len": 4096}.')
    ] = "{}",
) -> None:
    """Complete every prompt; a prompt that fails has its `error`, and the others their completions."""
    engine, params = _json_object("--engine-args", engine_args), _json_object("--sampling", sampling)
    if spec != "off":
        engine["speculative_config"] = _json_object("--spec", spec) if spec.startswith("{") else spec
    if Path(out).exists():
        raise typer.BadParameter(f"out {out}: is there already; name a new folder")
    # Of several nodes only this one knows where relative paths begin.
    model, prompts = (str(Path(path).resolve()) if Path(path).exists() else path for path in (model, prompts))
    out = out if "://" in out else str(Path(out).resolve())
    import ray

    ray.init()
    began = time.monotonic()
    given = ray.data.read_json(prompts, lines=True)
    columns = given.columns()
    if "prompt" not in columns:
        raise typer.BadParameter(f"prompts {prompts}: lines have {', '.join(columns)}, and no `prompt`")

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        # What is no text, or is missing, is an error of its own line: the engine takes no empty prompt.
        prompt = row["prompt"] if isinstance(row["prompt"], str) else ""
        return {**row, "prompt": prompt, "sampling_params": params}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        known = {name: row[name] for name in columns}
        completion, tokens = row["generated_text"], row["num_generated_tokens"]
        return known | {"completion": completion, "tokens": tokens, "error": row["__inference_error__"]}

    # Not as the processor's own last step, which passes over what failed.
    _processor(model, engine, replicas, ask)(given).map(answer).write_json(out)

    seconds = time.monotonic() - began
    number = tokens = failed = 0
    for batch in ray.data.read_json(out, lines=True).select_columns(["tokens", "error"]).iter_batches():
        number += len(batch["tokens"])
        tokens += batch["tokens"].sum()
        failed += (batch["error"] != "").sum()
    print(
        f"{number} prompts, {tokens} tokens in {seconds:.0f} s, with the start of the engines; {failed} failed. "
        f"Written to {out}"
    )
    raise typer.Exit(failed > 0)


def _processor(model: str, engine: dict[str, Any], replicas: int, ask: Callable) -> Callable:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    placement: dict[str, Any] = {}
    if not ray.cluster_resources().get("GPU"):
        # One processor is left for reading and writing. The engines of a machine must not be pinned to the same ones.
        free = int(ray.cluster_resources()["CPU"]) - 1
        if free < replicas:
            raise typer.BadParameter(f"--replicas {replicas}: this cluster has no GPU, and processors for {free}")
        placement = {
            "placement_group_config": {"bundles": [{"CPU": free // replicas}]},
            "runtime_env": {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        }
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=engine,
        concurrency=(replicas, replicas),
        should_continue_on_error=True,
        # Prompts are text, which the engines take and give.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **placement,
    )
    return build_processor(config, preprocess=ask)


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{name} {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{name} {text!r}: give a JSON object")
    return found


if __name__ == "__main__":
    typer.run(main)
