"""The shipped demo model: real text, drafts that are really accepted, and every Python way to ask for `del`."""

from typing import Any

import pytest

from tests.conftest import DEMO_MODEL
from tests.engine.host import Arrival, Host
from tests.engine.test_drafts import drafter_of

PROMPTS = [
    "def __init__(self, ",
    "import os\nimport sys\n\n\nclass ",
    "    for name in sorted(",
    '    """Return the ',
]
GREEDY = {"temperature": 0, "max_tokens": 96, "ignore_eos": True}
BY_LAYERS = {"method": "del", "del_objective": "tpl"}

pytestmark = pytest.mark.engine


def test_drafts_are_accepted_and_the_text_is_the_models_own(host: Host) -> None:
    prompts, sampling = (PROMPTS, GREEDY) if host.runner == "v1" else (PROMPTS[:2], {**GREEDY, "max_tokens": 24})
    off = host.generate(str(DEMO_MODEL), prompts, sampling)
    on = host.generate(str(DEMO_MODEL), prompts, sampling, "del")
    assert on.completions == off.completions
    # V2 has fewer tokens here, and what its policy has learnt gets to the scheduler some steps later.
    share, steps = (0.3, 0.7) if host.runner == "v1" else (0.2, 0.85)
    assert on.accepted / on.drafted > share
    assert on.steps < steps * off.steps


@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_compiled_layers_draft_as_well(host: Host) -> None:
    """Without `enforce_eager`: one graph, compiled while vLLM warms up, serves every number of rows.

    By tokens per layer: what is drafted hangs on the text alone, not on what an engine has served before.
    """
    arrivals = [Arrival(prompt, GREEDY, step=8 * i) for i, prompt in enumerate(PROMPTS)]
    eager = host.serve(str(DEMO_MODEL), arrivals, BY_LAYERS)
    off = host.serve(str(DEMO_MODEL), arrivals, enforce_eager=False)
    compiled_at_start = host.call(_is_compiled, {"enforce_eager": False})
    on = host.serve(str(DEMO_MODEL), arrivals, BY_LAYERS, enforce_eager=False)
    assert compiled_at_start
    assert on.completions == off.completions
    assert on.accepted / on.drafted == pytest.approx(eager.accepted / eager.drafted, abs=0.05)


def _is_compiled(options: dict[str, Any]) -> bool:
    """In the engine's process: whether the draft layers are compiled."""
    from tests.engine.host import _engine

    engine = _engine(str(DEMO_MODEL), BY_LAYERS, options)
    return all(segment.compiled for segment in drafter_of(engine).segments)


def test_structured_output(host: Host) -> None:
    """A grammar forbids some drafts; vLLM drops those, and the rest is as without speculation."""
    sampling = {**GREEDY, "ignore_eos": False, "max_tokens": 40}
    off, on = (host.call(_matching, r"[a-z_]+\([a-z]+, [0-9]{2,4}\)", sampling, spec) for spec in (None, "del"))
    assert on[0] == off[0]
    assert on[1] > 0


def _matching(regex: str, sampling: dict[str, Any], spec: Any) -> tuple[Any, int]:
    """In the engine's process: completions that match `regex`, and the number of accepted drafts."""
    from vllm.sampling_params import StructuredOutputsParams

    from tests.engine.host import Arrival, _serve

    params = {**sampling, "structured_outputs": StructuredOutputsParams(regex=regex)}
    outcome = _serve(str(DEMO_MODEL), tuple(Arrival(prompt, params) for prompt in PROMPTS), spec, {})
    return outcome.completions, outcome.accepted


@pytest.mark.parametrize("host", ["v1"], indirect=True)
def test_llm_takes_the_word_and_the_dict(host: Host) -> None:
    """`LLM(speculative_config="del")` and `{"method": "del"}` start the same engine."""
    configs = [host.call(_llm_config, spec) for spec in ("del", {"method": "del"})]
    assert configs[0] == configs[1]
    assert configs[0].startswith("DelConfig(method='del'")


def _llm_config(spec: Any) -> str:
    """In the engine's process: what an `LLM` made of `spec`, after it has generated with it."""
    from vllm import LLM, SamplingParams

    from tests.engine.host import ENGINE_DEFAULTS

    llm = LLM(str(DEMO_MODEL), speculative_config=spec, **ENGINE_DEFAULTS)
    (output,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4
    return repr(llm.llm_engine.vllm_config.speculative_config)
