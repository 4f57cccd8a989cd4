"""The kernels compile for GPUs, on machines without one too: Triton brings the assembler and needs no device."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""The shared memory that a program may have, by compute capability (CUDA's programming guide)."""

Compiled = dict[str, Any]
"""By name, the kernels that a call would have launched."""


class NoDevice:
    """Stands where Triton looks for a GPU, and says which one to compile for."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: capability
        self.get_current_stream = lambda device: 0


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compiled]:
    """`compile_for(capability, operation, *args, **kwargs)`: what the call launches is compiled, and not run."""
    assert not triton.knobs.runtime.interpret, "Triton is interpreted in processes of its own, not here"
    compiled: Compiled = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compiled[self.__name__] = run(self, *args, warmup=True, **kwargs)
        return kernel

    def compile_for(capability: int, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Compiled:
        driver.set_active(NoDevice(capability))
        compiled.clear()
        operation(*args, **kwargs)
        return dict(compiled)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", driver._active)
    monkeypatch.setattr("vllm_del.kernels.exit_head.triton._processors", lambda device: 132)
    return compile_for


def spilled(kernel: Any, path: Path) -> int:
    """Bytes of registers that a program of this kernel puts into memory, as the assembler says."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    path.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True)
    (local,) = re.findall(r"LOCAL:(\d+)", usage.stdout + usage.stderr)
    return int(local)


def check(compiled: Compiled, capability: int, expected: set[str], path: Path) -> None:
    assert compiled.keys() == expected
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= SHARED_BYTES[capability], name
        assert not spilled(kernel, path / name), name


def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"norm_weight": of(4096)},
    "soft-cap": {"soft_cap": 30.0, "logit_scale": 0.5},
    "shortlist": {"shortlist": of(32768, dtype=torch.int64)},
    "float8": {"row_scales": of(128256, dtype=torch.float32)},
    "noise": {"temperature": of(64, dtype=torch.float32), "seeds": of(64, dtype=torch.int64)},
}


@pytest.mark.parametrize(
    ("capability", "rows", "shape"),
    [
        *((90, rows, shape) for rows in (16, 128) for shape in range(5)),
        *((capability, rows, 0) for capability in (80, 100) for rows in (16, 128)),
        *((90, rows, 0) for rows in (1, 32, 64)),
    ],
)
def test_exit_head(
    compile_for: Callable[..., Compiled],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: int,
    rows: int,
    shape: int,
) -> None:
    from vllm_del.kernels.exit_head import triton

    monkeypatch.setattr(triton, "SHAPES", triton.SHAPES[shape:])
    compiled = compile_for(capability, triton.exit_head, of(rows, 4096), of(128256, 4096))
    check(compiled, capability, {"_read_part", "_merge_parts"}, tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_options(compile_for: Callable[..., Compiled], tmp_path: Path, option: str, dtype: torch.dtype) -> None:
    from vllm_del.kernels.exit_head.triton import exit_head

    weight = of(128256, 4096, dtype=torch.float8_e4m3fn if option == "float8" else dtype)
    options = dict(OPTIONS[option])
    if option == "norm":
        options["norm_weight"] = of(4096, dtype=dtype)
    compiled = compile_for(90, exit_head, of(16, 4096, dtype=dtype), weight, **options)
    check(compiled, 90, {"_read_part", "_merge_parts"}, tmp_path)


@pytest.mark.parametrize("pairs", [16, 128])
def test_shadow_agree(compile_for: Callable[..., Compiled], tmp_path: Path, pairs: int) -> None:
    from vllm_del.kernels.shadow_agree.triton import shadow_agree

    compiled = compile_for(90, shadow_agree, of(pairs, 4096), of(128256, 4096), of(pairs, dtype=torch.int64))
    check(compiled, 90, {"_read_part", "_compare"}, tmp_path)


def test_exit_rows(compile_for: Callable[..., Compiled], tmp_path: Path) -> None:
    from vllm_del.kernels.exit_rows.triton import exit_rows

    compiled = compile_for(90, exit_rows, of(64, 4096), of(64, dtype=torch.int64), 1, of(64, 4096))
    check(compiled, 90, {"_copy"}, tmp_path)


@pytest.mark.parametrize("groups", [0, 1, 2])
@pytest.mark.parametrize("ends_a_step", [False, True])
def test_advance_rows(compile_for: Callable[..., Compiled], tmp_path: Path, groups: int, ends_a_step: bool) -> None:
    from vllm_del.kernels.advance_rows import Said
    from vllm_del.kernels.advance_rows.triton import advance_rows

    rows, long, real = 256, torch.int64, torch.float32
    tables = [of(rows, 2048, dtype=torch.int32)] * groups
    slots = [of(rows, dtype=long)] * groups
    said = Said(
        of(rows, dtype=long),
        of(rows, dtype=real),
        1,
        of(rows, dtype=long),
        of(rows, dtype=real),
        of(rows, dtype=torch.int32),
        of(rows, dtype=long),
        of(rows, 8, dtype=long),
        of(rows, 8, dtype=real),
    )
    state = of(rows, dtype=long), of(rows, dtype=torch.int32), of(rows, dtype=torch.bool)
    extra = (said,) if ends_a_step else ()
    compiled = compile_for(90, advance_rows, *state, tables, [16] * groups, slots, 32768, *extra)
    check(compiled, 90, {"_advance"}, tmp_path)
