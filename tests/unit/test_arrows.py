"""Imports point down only: engine -> draft -> policy, kernels; below the engine nothing knows vLLM."""

import ast
from pathlib import Path

import pytest
import vllm_del.kernels

import vllm_del

PACKAGE = Path(vllm_del.__file__).parent
KERNELS = Path(vllm_del.kernels.__file__).parent
MAY_IMPORT = {
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


@pytest.mark.parametrize("folder", MAY_IMPORT, ids=lambda folder: folder.name)
def test_lower_packages_import_only_what_lies_below(folder: Path) -> None:
    files = list(folder.rglob("*.py"))
    assert len(files) > 1
    for file in files:
        for name in imported(file):
            assert name.split(".")[0] != "vllm", f"{file.name} imports {name}"
            if name.split(".")[0] == "vllm_del":
                assert any(name.startswith(allowed) for allowed in MAY_IMPORT[folder]), f"{file.name} imports {name}"
