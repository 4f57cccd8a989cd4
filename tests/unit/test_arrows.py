"""Imports point down only: engine -> draft -> policy, kernels; below the engine nothing knows vLLM."""

import ast
from pathlib import Path

import pytest
import vllm_del.kernels

import vllm_del

PACKAGE = Path(vllm_del.__file__).parent
KERNELS = Path(vllm_del.kernels.__file__).parent
# What each may import of ours. The files at the top are imported before anyone has asked for `del`.
MAY_IMPORT: dict[Path, set[str]] = {
    PACKAGE / "asking.py": set(),
    PACKAGE / "wishes.py": set(),
    PACKAGE / "config.py": {"vllm_del.asking"},
    PACKAGE / "plugin.py": {"vllm_del.engine"},
    PACKAGE / "policy": {"vllm_del.policy"},
    KERNELS: {"vllm_del.kernels"},
    PACKAGE / "draft": {"vllm_del.draft", "vllm_del.policy", "vllm_del.kernels"},
}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{file}: a relative import from further up"
            names |= {node.module} if node.module and not node.level else set()
    return names


@pytest.mark.parametrize("place", MAY_IMPORT, ids=lambda place: place.name)
def test_only_what_lies_below_is_imported(place: Path) -> None:
    files = list(place.rglob("*.py")) if place.is_dir() else [place]
    assert len(files) > place.is_dir()
    for file in files:
        for name in imported(file):
            if place.is_dir():
                assert name.split(".")[0] != "vllm", f"{file.name} imports {name}"
            if name.split(".")[0] == "vllm_del":
                allowed = any(f"{name}.".startswith(f"{module}.") for module in MAY_IMPORT[place])
                assert allowed, f"{file.name} imports {name}"
