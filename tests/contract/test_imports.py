"""Every name that we import from vLLM is there. Imports nothing itself, so each missing name is one failure."""

import pytest

from tests.contract import source

IMPORTS = [(file, found) for file in source.our_files() for found in source.imports_from_vllm(file)]


@pytest.mark.parametrize(
    ("file", "found"), IMPORTS, ids=[f"{file}:{found.module}.{found.name}" for file, found in IMPORTS]
)
def test_exists(file: str, found: source.Import):
    try:
        found.resolve()
    except ImportError as error:
        pytest.fail(f"{file} needs {found.name} of {found.module}: {error}")


def test_the_reading_works():
    """Names imported at the top, inside a function, and as a module."""
    found = {imported.known_as for imported in source.imports_from_vllm("vllm_del/engine/patches.py")}
    assert {"EngineArgs", "DraftModelProposer", "runner_v2"} <= found
