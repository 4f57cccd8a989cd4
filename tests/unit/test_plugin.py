"""The entry point: what installing the package does to vLLM, and what it does not."""

import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
import vllm.v1.worker.gpu.model_runner as runner_v2
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.worker_base import WorkerWrapperBase

import vllm_del
from vllm_del import plugin
from vllm_del.config import DelConfig
from vllm_del.engine import patches
from vllm_del.engine.proposer import DelProposer
from vllm_del.engine.speculator import DelSpeculator
from vllm_del.engine.wrap import MARK

PATCHED = [
    (EngineArgs, "add_cli_args"),
    (EngineArgs, "create_engine_config"),
    (EngineArgs, "create_speculative_config"),
    (WorkerWrapperBase, "init_device"),
]


def without_our_patches(function: Callable) -> Callable:
    """vLLM's own function."""
    return inspect.unwrap(function, stop=lambda f: not hasattr(f, MARK))


def num_patches(function: Callable) -> int:
    """How many of our patches lie around vLLM's own function."""
    functions = [function]
    while hasattr(functions[-1], "__wrapped__"):
        functions.append(functions[-1].__wrapped__)
    return sum(hasattr(f, MARK) for f in functions)


def run_python(code: str, folder: Path) -> str:
    """What `code` prints in a fresh process started in `folder`."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestEntryPoint:
    def test_is_declared_and_loads(self):
        (entry_point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="vllm_del")
        assert entry_point.load() is plugin.register

    def test_costs_nothing_to_import(self, tmp_path: Path):
        code = "import sys, vllm_del.plugin; print(sorted({'vllm', 'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
        assert run_python(code, tmp_path) == "[]"

    def test_registering_imports_nothing_that_vllm_has_not(self, tmp_path: Path):
        """Only what parses the arguments: no worker, no model runner, and nothing of ours that drafts."""
        code = (
            "import sys, vllm.engine.arg_utils; before = set(sys.modules); import vllm_del.plugin as p; p.register(); "
            "print(sorted(m for m in set(sys.modules) - before if m.startswith(('vllm', 'torch'))))"
        )
        engine = ["", ".command_line", ".patches", ".support", ".wrap"]
        ours = ["vllm_del", "vllm_del.asking", "vllm_del.config", *(f"vllm_del.engine{m}" for m in engine)]
        ours += ["vllm_del.plugin", "vllm_del.wishes"]
        assert run_python(code, tmp_path) == str(ours)

    def test_kernels_is_ours_only_inside_our_package(self, tmp_path: Path):
        """Another well-known package is called `kernels`."""
        code = (
            "import importlib.util as u; import vllm_del.kernels as k; "
            "print(u.find_spec('kernels') is None, k.__name__, k.__file__)"
        )
        absent, name, file = run_python(code, tmp_path).split()
        assert (absent, name) == ("True", "vllm_del.kernels")
        assert file.endswith("kernels/__init__.py")


class TestRegister:
    @pytest.mark.parametrize(("owner", "name"), PATCHED)
    def test_patches_once_however_often_it_is_called(self, owner, name):
        for _ in range(3):
            plugin.register()
        assert num_patches(getattr(owner, name)) == 1

    @pytest.mark.parametrize(("owner", "name"), PATCHED)
    def test_keeps_what_vllm_says_of_the_function(self, owner, name):
        patched = getattr(owner, name)
        original = patched.__wrapped__
        assert inspect.signature(patched) == inspect.signature(original)
        assert patched.__doc__ == original.__doc__
        assert patched.__qualname__ == original.__qualname__

    def test_static_stays_static(self):
        for args_class in (EngineArgs, AsyncEngineArgs):
            assert isinstance(inspect.getattr_static(args_class, "add_cli_args"), staticmethod)
        assert not isinstance(inspect.getattr_static(EngineArgs, "create_engine_config"), staticmethod)


class TestVersionOutsideTheRange:
    @pytest.fixture
    def unpatched(self, monkeypatch):
        """vLLM as it is before `register`, for the time of the test."""
        for owner, name in PATCHED:
            # monkeypatch puts back what it finds, so nothing that `register` does here outlives the test.
            original = without_our_patches(getattr(owner, name))
            is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
            monkeypatch.setattr(owner, name, staticmethod(original) if is_static else original)
        assert not any(num_patches(getattr(owner, name)) for owner, name in PATCHED)

    @pytest.fixture
    def register(self, unpatched, monkeypatch):
        def register(version: str) -> None:
            monkeypatch.setattr(vllm, "__version__", version)
            plugin.register()

        return register

    @pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.34.1", "0.34.0rc1", "1.0.0", "dev"])
    @pytest.mark.parametrize("asking", [{"speculative_config": "del"}, {"spec_method": "del"}])
    def test_asking_for_del_is_refused_in_one_line(self, version, asking, register, engine_config):
        register(version)
        with pytest.raises(ValueError, match="vllm-del supports") as error:
            engine_config(**asking)
        message = str(error.value)
        assert "\n" not in message
        for words in (f"vLLM {version} is installed", ">=0.32", "<0.34", "install a supported vLLM"):
            assert words in message

    def test_the_words_of_the_command_line_reach_the_refusal(self, register, models):
        register("0.40.0")
        for words in (["--speculative-config", "del"], ["--spec-method", "del"]):
            parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
            parsed = parser.parse_args(["--model", models["llama"], "--skip-tokenizer-init", *words])
            with pytest.raises(ValueError, match=r"vLLM 0\.40\.0 is installed"):
                AsyncEngineArgs.from_cli_args(parsed).create_engine_config()

    def test_not_asking_changes_nothing(self, register, engine_config):
        register("0.40.0")
        assert engine_config().speculative_config is None
        ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
        assert type(engine_config(speculative_config=ngram).speculative_config) is SpeculativeConfig
        assert num_patches(EngineArgs.create_speculative_config) == 0
        assert num_patches(WorkerWrapperBase.init_device) == 0

    @pytest.mark.parametrize("version", ["0.33.5", "0.40.0"])
    @pytest.mark.parametrize(
        ("owner", "name", "changed"),
        [
            ("vllm.v1.worker.worker_base", "WorkerWrapperBase", False),
            ("vllm.config.utils", "config", False),
            ("vllm.config.utils", "config", True),
            ("vllm.sampling_params.SamplingParams", "_validate_spec_decode", False),
        ],
    )
    def test_a_vllm_without_what_we_build_on_still_starts(
        self, owner, name, changed, version, register, engine_config, monkeypatch
    ):
        """vLLM moves its internals, and does not catch what an entry point raises: its own users would be hit."""
        ours = {key: loaded for key, loaded in sys.modules.items() if key.startswith("vllm_del.")}
        for key, loaded in ours.items():
            # Imported anew under this test, and put back after it.
            parent, _, child = key.rpartition(".")
            monkeypatch.setattr(ours.get(parent, vllm_del), child, loaded)
            if key != plugin.__name__:
                monkeypatch.delitem(sys.modules, key)
        with monkeypatch.context() as vllm_of_theirs:
            if changed:
                vllm_of_theirs.setattr(f"{owner}.{name}", needs_more)
            else:
                vllm_of_theirs.delattr(f"{owner}.{name}")
            register(version)
        assert engine_config().speculative_config is None
        with pytest.raises(ValueError, match=f"vLLM {version}"):
            engine_config(speculative_config="del")

    def test_a_vllm_without_the_spec_method_option_still_starts(self, register, engine_args, monkeypatch):
        """vLLM 0.24, for one, has no `--spec-method`."""
        monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: "built")
        register("0.24.0")
        args = engine_args()
        monkeypatch.delattr(EngineArgs, "spec_method")
        del args.spec_method
        assert args.create_engine_config() == "built"

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.1rc1", "0.33.2.dev5+g1234abc"])
    def test_inside_the_range_del_is_served(self, version, register, engine_config):
        register(version)
        assert isinstance(engine_config(speculative_config="del").speculative_config, DelConfig)


def needs_more(*, something: int) -> None:
    """A function that vLLM has another one in the place of."""


class Worker:
    """What the wrapper calls of a worker."""

    def __init__(self, reached: list, model_runner: Any) -> None:
        self.reached, self.model_runner = reached, model_runner

    def init_device(self) -> None:
        self.reached.append(True)

    def compile_or_warm_up_model(self) -> None: ...


class Runner:
    """What is looked for on a model runner."""

    use_aux_hidden_state_outputs = False

    def __init__(self) -> None:
        self.speculator = SimpleNamespace()

    def execute_model(self) -> None: ...

    def sample_tokens(self) -> None: ...


class TestWorker:
    """In a worker, the runner's drafter is ours when, and only when, the configuration is a DelConfig."""

    @pytest.fixture(autouse=True)
    def patched(self, monkeypatch) -> set[tuple[Any, str]]:
        """What a worker's start patches; all of it is undone after the test."""
        patched = set()
        wrap = patches.wrap

        def wrap_for_now(owner: Any, name: str, patch: Callable) -> None:
            if (owner, name) not in patched:
                patched.add((owner, name))
                monkeypatch.setattr(owner, name, without_our_patches(getattr(owner, name)))
            wrap(owner, name, patch)

        monkeypatch.setattr(patches, "wrap", wrap_for_now)
        return patched

    @staticmethod
    def start(vllm_config: VllmConfig) -> None:
        """Take a worker of this configuration to the call that builds its runner."""
        reached = []
        wrapper = WorkerWrapperBase()
        wrapper.vllm_config = vllm_config
        runner = Runner()
        wrapper.worker = Worker(reached, runner)
        wrapper.init_device()
        assert reached == [True]
        is_del = isinstance(vllm_config.speculative_config, DelConfig)
        assert runner.use_aux_hidden_state_outputs == is_del
        knows_its_runner = getattr(runner.speculator, "runner", None) is runner
        assert knows_its_runner == (is_del and vllm_config.use_v2_model_runner)

    @pytest.fixture
    def configs(self, engine_config, models) -> dict[str, VllmConfig]:
        draft_model = {"method": "draft_model", "model": models["llama"], "num_speculative_tokens": 2}
        return {
            "del": engine_config(speculative_config="del"),
            "draft_model": engine_config(speculative_config=draft_model),
            "none": engine_config(),
        }

    @pytest.mark.parametrize("runner", ["0", "1"])
    @pytest.mark.parametrize("name", ["draft_model", "none"])
    def test_not_asked_for(self, name, runner, configs, patched, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
        self.start(configs[name])
        assert patched <= {(WorkerWrapperBase, "init_device"), (StatLoggerManager, "__init__")}

    def test_v1(self, configs, patched, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        for _ in range(3):
            self.start(configs["del"])
        assert (DraftModelProposer, "__new__") in patched
        assert (runner_v2, "init_speculator") not in patched
        assert all(num_patches(getattr(owner, name)) == 1 for owner, name in patched)

        def kind(*args, **kwargs) -> type:
            return type(DraftModelProposer.__new__(DraftModelProposer, *args, **kwargs))

        assert kind(vllm_config=configs["del"], device=None, runner=None) is DelProposer
        assert kind(configs["del"], None) is DelProposer
        assert kind(vllm_config=configs["draft_model"], device=None, runner=None) is DraftModelProposer

    def test_v2(self, configs, patched, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        for _ in range(3):
            self.start(configs["del"])
        assert (runner_v2, "init_speculator") in patched
        assert (DraftModelProposer, "__new__") not in patched
        assert all(num_patches(getattr(owner, name)) == 1 for owner, name in patched)

        cpu = torch.device("cpu")
        assert type(runner_v2.init_speculator(configs["del"], cpu, None)) is DelSpeculator
        assert type(runner_v2.init_speculator(configs["draft_model"], cpu, None)) is StandaloneARSpeculator
