"""Batches over a Ray cluster: prompts in JSON lines become completions in JSON lines.

    python scripts/ray_batch.py MODEL prompts.jsonl completions --replicas 8

Ray Data's processor for vLLM does the work: it starts an engine for each replica, keeps it busy, and starts it again if
it dies. `del` is one word among the engine's arguments. Every node needs `pip install '.[ray]'` beside its vLLM, and
sees the same files; which cluster it is, `ray.init()` says. Exits with 1 if a prompt failed.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_del.cli import json_object

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
    engine, params = json_object("--engine-args", engine_args), json_object("--sampling", sampling)
    if spec != "off":
        engine["speculative_config"] = json_object("--spec", spec) if spec.startswith("{") else spec
    if Path(out).exists() and not (Path(out).is_dir() and not any(Path(out).iterdir())):
        raise typer.BadParameter(f"out {out}: is there already; name a new folder")
    # Of several nodes only this one knows where relative paths begin.
    model, prompts = (str(Path(path).resolve()) if Path(path).exists() else path for path in (model, prompts))
    out = out if "://" in out else str(Path(out).resolve())
    import ray
    from ray.data.datasource import BlockBasedFileDatasink

    class JsonLines(BlockBasedFileDatasink):
        def write_block_to_file(self, block: Any, file: Any) -> None:
            for row in block.iter_rows(public_row_format=True):
                file.write(row["line"].encode() + b"\n")

    ray.init()
    began = time.monotonic()

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        prompt = _fields(row["text"]).get("prompt")
        # The line goes along as text: in a table of their fields those of other lines would be filled in.
        known = {"line": row["text"], "sampling_params": params}
        return known | {"prompt": prompt if isinstance(prompt, str) else ""}

    # Answers are no last step of the processor's own, as it passes over what failed.
    answers = _processor(model, engine, replicas, ask)(ray.data.read_binary_files(prompts).flat_map(_lines)).map(
        _answer
    )
    answers.write_datasink(JsonLines(out, file_format="jsonl"))

    seconds = time.monotonic() - began
    number = tokens = failed = 0
    for row in ray.data.read_text(out).iter_rows():
        line = json.loads(row["text"])
        number, tokens, failed = number + 1, tokens + line["tokens"], failed + bool(line["error"])
    print(
        f"{number} prompts, {tokens} tokens in {seconds:.0f} s, with the start of the engines; {failed} failed. "
        f"Written to {out}"
    )
    raise typer.Exit(1 if failed else 0)


def _lines(file: dict[str, Any]) -> list[dict[str, str]]:
    """Of a file's bytes; Python's own lines of text end where those of JSON do not."""
    lines = file["bytes"].split(b"\n")
    return [{"text": line.decode(errors="replace")} for line in lines if line.strip()]


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    said = {"completion": row["generated_text"], "tokens": row["num_generated_tokens"]}
    error = row["__inference_error__"] if row["prompt"] else "there is no text in `prompt`"
    return {"line": json.dumps(_fields(row["line"]) | said | {"error": error})}


def _fields(line: str) -> dict[str, Any]:
    """What a line of the prompts says; of one that is no JSON object the whole of it, under another name."""
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(line), dict):
            return found
    return {"line": line}


def _processor(model: str, engine: dict[str, Any], replicas: int, ask: Callable) -> Callable:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from vllm.platforms import current_platform

    placement: dict[str, Any] = {}
    if current_platform.is_cpu():
        # The largest share of a node's processors that there is for each engine, one left for reading and writing.
        nodes = sorted(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        nodes[-1] -= 1
        shares = range(1, 1 + max(nodes))
        share = max((each for each in shares if sum(node // each for node in nodes) >= replicas), default=0)
        if not share:
            raise typer.BadParameter(f"--replicas {replicas}: this cluster has processors for {sum(nodes)}")
        placement = {
            "placement_group_config": {"bundles": [{"CPU": share}]},
            # The engines of a machine must not be pinned to the same processors.
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


if __name__ == "__main__":
    typer.run(main)
