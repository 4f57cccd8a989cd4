"""The `vllm-del` command: `vllm-del profile MODEL` says whether a model suits, before anyone serves it."""

import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_del.policy.cost import Correction
from vllm_del.policy.predict import Prediction, Profile

BATCHES = (1, 4, 16, 64)
# For a model that nobody has given prompts for: prose, code, a list, a dialogue.
PROMPTS = (
    "The history of the printing press begins",
    'def read_config(path):\n    """Read a configuration file and return a dict."""\n',
    "Ingredients for a simple vegetable soup:\n-",
    "Q: What is the capital of France?\nA: Paris.\nQ: And of Italy?\nA:",
    "In a distributed system, consensus means that",
    "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n    def test_empty(self):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, COUNT(*) FROM orders",
)

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console(stderr=True, highlight=False)


@app.callback()
def main() -> None:
    """Self-speculative decoding for vLLM."""


@app.command()
def profile(
    model: Annotated[str, typer.Argument(help="A model as `vllm serve` takes it.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line; \\n in it is a new line.")] = None,
    exits: Annotated[str, typer.Option(help="Depths to ask, such as 4,8,12; default: up to seven.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for a prompt.", min=1)] = 128,
    max_draft: Annotated[int, typer.Option(help="The longest draft to think of.", min=1, max=64)] = 8,
    batch: Annotated[int, typer.Option(help="Sequences at once, and the largest batch measured.", min=1)] = 64,
    draft_vocab: Annotated[str, typer.Option(help="As del_draft_vocab: draft of so many tokens, or of a file's.")] = "",
    draft_head: Annotated[str, typer.Option(help="As del_draft_head: model or fp8.")] = "",
    engine_args: Annotated[str, typer.Option(help='More of vLLM\'s arguments, as JSON: {"dtype": "float32"}.')] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: agreement by exit, speed-up by batch.")] = None,
) -> None:
    """Decode real prompts, ask every exit, measure every step; print agreement, costs and the predicted speed-up."""
    from vllm_del.engine.profiling import profile as run

    depths = _numbers(exits)
    texts = _read(prompts) if prompts else list(PROMPTS)
    listed = int(draft_vocab) if draft_vocab.isdecimal() else draft_vocab
    given = {"del_draft_vocab": listed, "del_draft_head": draft_head}
    head = {name: value for name, value in given.items() if value != ""}
    if plot and not find_spec("matplotlib"):
        raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib")
    if plot and not plot.parent.is_dir():
        raise typer.BadParameter(f"--plot {plot}: there is no folder {plot.parent}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Starting vLLM", total=len(texts) * (3 if head else 2))

        def advance(number: int) -> None:
            bar.update(task, advance=number, description="Prompts")

        result = run(
            model, texts, depths, max_tokens, batch, max_draft, head, advance, json_object("--engine-args", engine_args)
        )
    batches = sorted({*(number for number in BATCHES if number < batch), batch})
    predictions = result.predictions(batches)
    configuration = result.configuration(batches)
    if as_json:
        print(json.dumps(as_dict(result, predictions, configuration), indent=1, allow_nan=False))
    else:
        show(result, predictions, configuration)
    if plot:
        draw(result, predictions, plot)


def _numbers(text: str) -> list[int] | None:
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError:
        raise typer.BadParameter(f"--exits {text!r}: give depths, such as 4,8,12") from None


def _read(file: Path) -> list[str]:
    try:
        lines = [line.replace("\\n", "\n") for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise typer.BadParameter(f"--prompts {file}: {error.strerror}") from None
    if not lines:
        raise typer.BadParameter(f"--prompts {file}: there is no prompt in it")
    return lines


def json_object(option: str, text: str) -> dict[str, Any]:
    """What an option says in JSON; raises `typer.BadParameter` with the option's name if that is no object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{option} {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{option} {text!r}: give a JSON object")
    return found


def as_dict(result: Profile, predictions: list[Prediction], configuration: dict | None) -> dict[str, Any]:
    """All of it, for `--json`, which has no NaN: what is not known is null."""
    of_batches = [asdict(found) | {"speed_up": found.speed_up} for found in predictions]
    return _known(asdict(result) | {"predictions": of_batches, "configuration": configuration})


def _known(value: Any) -> Any:
    """With None in place of what is no finite number."""
    if isinstance(value, dict):
        return {name: _known(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [_known(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(result: Profile, predictions: list[Prediction], configuration: dict | None) -> None:
    """All of it, for a reader."""
    out = Console(highlight=False)
    title = f"{result.model}: {result.num_layers} layers, {result.tokens} tokens, context {result.context} in the mean"
    columns = ["exit", "asked", "agreement", "its confidence if right", "if wrong"]
    columns += ["agreement, whole head"] if result.head else []
    exits = Table(*columns)
    for exit in result.exits:
        confidences = f"{exit.confidence_right:.2f}", f"{exit.confidence_wrong:.2f}"
        through_all = [] if exit.whole_head is None else [f"{exit.whole_head:.3f}"]
        exits.add_row(str(exit.depth), str(exit.asked), f"{exit.agreement:.3f}", *confidences, *through_all)
    # Not as a table's title, which is no wider than the table.
    out.print(title, soft_wrap=True)
    out.print(exits)

    costs, of = result.costs, result.correction
    out.print(f"\nMilliseconds. A draft step takes {costs.step * 1e3:.3f}, its layers, and the head.", soft_wrap=True)
    times = Table("rows, or tokens verified", "layer of a draft step", "head", "verification")
    tables = [
        dict(zip(numbers, seconds, strict=True))
        for numbers, seconds in (
            (costs.rows, costs.layer),
            (costs.head_rows, costs.head),
            (costs.tokens, costs.verify),
        )
    ]
    for number in sorted(set().union(*tables)):
        times.add_row(str(number), *(f"{table[number] * 1e3:.3f}" if number in table else "" for table in tables))
    out.print(times)
    out.print(
        f"A thousand tokens more of context: {costs.layer_context * 1e6:.3f} ms a row and layer of a draft step, "
        f"{costs.verify_context * 1e6:.3f} ms a row of a verification."
    )
    if costs.uneven:
        out.print(f"Where several rows verify drafts, {costs.uneven * 1e3:.3f} ms more.")
    if of != Correction():
        out.print(
            f"By the clock, while decoding: verification takes {of.verify:.2f} of that, a draft step {of.draft:.2f}; "
            f"beside them a round takes {of.overhead * 1e3:.2f} ms, and a draft step {of.step * 1e3:.2f} ms."
        )
    out.print()

    out.print("Predicted")
    batches = Table("batch", "tokens/s without", "with del", "speed-up", "plan")
    for found in predictions:
        plan = f"{found.length} tokens after layer {found.depth}" if found.length else "no drafts"
        rates = f"{found.without:.0f}", f"{found.best:.0f}", f"{found.speed_up:.2f}"
        batches.add_row(str(found.batch), *rates, plan)
    out.print(batches)
    if configuration is None:
        out.print("[bold]del will not pay for this model here[/]: leave it out.")
    else:
        out.print(f"[bold]Serve it with[/] --speculative-config '{json.dumps(configuration)}'", soft_wrap=True)


def draw(result: Profile, predictions: list[Prediction], file: Path) -> None:
    """Agreement by exit and predicted speed-up by batch, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([exit.depth for exit in result.exits], [exit.agreement for exit in result.exits], "o-")
    left.set(xlabel="layers run", ylabel="agreement with the last layer", ylim=(0, 1), xlim=(0, result.num_layers))
    right.plot([found.batch for found in predictions], [found.speed_up for found in predictions], "o-")
    right.axhline(1.0, color="grey", linewidth=0.8)
    right.set(xlabel="batch", ylabel="predicted speed-up", xscale="log", xticks=[found.batch for found in predictions])
    right.set_xticklabels([str(found.batch) for found in predictions])
    figure.suptitle(result.model)
    figure.savefig(file)
