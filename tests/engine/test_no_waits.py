"""On runner V2 a whole round, from what was verified to the last draft, reads no value of the device.

Here the device is the host, and what is read of tensors that vLLM keeps on the host looks the same: it is known by
where and how often it is read.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.engine import host as engines
from tests.engine.checkpoints import checkpoint
from tests.engine.host import Host
from tests.engine.test_drafts import drafter_of

PROMPTS = [[5, 6, 7], list(range(20, 30)), [9] * 5]
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}
# Attention as GPUs have it: the CPU's own builds its metadata on the host.
ENGINE = {"attention_backend": "TRITON_ATTN"}
DYNAMIC = {"method": "del", "del_exit_layers": [1, 3], "num_speculative_tokens": 3}

# vLLM's bounds on contexts, `seq_lens_cpu_upper_bound`, once in a round each
OF_THE_HOST = {"speculator.py:_forward", "speculator.py:_rest", "steps.py:on_v2"}
# of `query_start_loc_cpu`, wherever it builds metadata for a draft step
VLLMS_OWN = "speculator.py:_build_attn_metadata"

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("host", ["v2"], indirect=True)]


@pytest.mark.parametrize("spec", [DYNAMIC, {**DYNAMIC, "del_draft_vocab": 60}], ids=["whole head", "counted tokens"])
def test_rounds(host: Host, checkpoints: Path, spec: dict[str, Any]) -> None:
    model = checkpoint(checkpoints, "llama")
    expected = host.generate(model, PROMPTS, GREEDY, **ENGINE)
    host.call(_watch, model, spec)
    watched = host.generate(model, PROMPTS, GREEDY, spec, **ENGINE)
    rounds, places = host.call(_seen, model, spec)
    assert watched.completions == expected.completions
    assert watched.accepted > 0
    assert rounds >= 5
    assert places.keys() <= OF_THE_HOST | {VLLMS_OWN}
    assert all(places[place] <= rounds for place in OF_THE_HOST)
    assert places, "the watch sees nothing"


def _watch(model: str, spec: dict[str, Any]) -> None:
    """In the engine's process: from now on note what waits, in rounds."""
    from tests.draft.test_no_waits import Watch

    drafter = drafter_of(engines._engine(model, spec, ENGINE))
    drafter.watch, drafter.rounds, propose = Watch(), 0, drafter.propose

    def watched(*args: Any, **kwargs: Any) -> Any:
        drafter.rounds += 1
        with drafter.watch:
            return propose(*args, **kwargs)

    drafter.propose = watched


def _seen(model: str, spec: dict[str, Any]) -> tuple[int, Counter[str]]:
    drafter = drafter_of(engines._engine(model, spec, ENGINE))
    del drafter.propose
    return drafter.rounds, Counter(drafter.watch.places)
