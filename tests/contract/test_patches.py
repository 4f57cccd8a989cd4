"""What our configuration and our patches count on in vLLM's configuration, plugins and workers."""

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tests.contract import source
from tests.contract.places import (
    RUNNER_V1,
    RUNNER_V2,
    at,
    parameters,
)


class TestConfiguration:
    def test_speculative_config(self):
        """`DelConfig` refuses a field of another method by its value, which needs a default to compare with."""
        theirs = at("vllm.config:SpeculativeConfig")
        assert is_dataclass(theirs)
        shared = at("vllm_del.config:_SHARED_FIELDS")
        names = {field.name for field in fields(theirs)}
        assert shared <= names, f"gone: {shared - names}"
        assert {"model", "draft_tensor_parallel_size"} <= names
        without_default = [f.name for f in fields(theirs) if f.name not in shared and f.default is MISSING]
        assert not without_default

    def test_property_stays_a_property(self):
        name = "max_num_new_slots_for_drafting"
        assert isinstance(inspect.getattr_static(at("vllm.config:SpeculativeConfig"), name), property)

    def test_methods(self):
        """With a `del` of vLLM's own, ours would have to find another name."""
        methods = get_args(at("vllm.config.speculative:SpeculativeMethod"))
        assert "draft_model" in methods
        assert "del" not in methods

    def test_look_ahead_slots_go_to_a_draft_model(self):
        draft_model = SimpleNamespace(
            use_dspark=lambda: False, use_dflash=lambda: False, use_eagle=lambda: False, uses_draft_model=lambda: True
        )
        vllm_config = SimpleNamespace(speculative_config=draft_model, num_speculative_tokens=5)
        assert at("vllm.config:VllmConfig.num_lookahead_tokens").fget(vllm_config) == 5

    def test_asynchronous_scheduling_is_allowed_by_the_method_string(self):
        """What then comes of it, `tests/unit/test_config_in_vllm.py` looks at."""
        post_init = source.tree_of(at("vllm.config:VllmConfig.__post_init__"))
        comparisons = [node for node in ast.walk(post_init) if isinstance(node, ast.Compare)]
        of_the_method = [ast.unparse(node) for node in comparisons if ast.unparse(node.left).endswith(".method")]
        assert any("'draft_model'" in text for text in of_the_method)

    def test_command_line_options(self):
        """Those of vLLM's own parser, before our patch changes it."""
        add_cli_args = inspect.unwrap(at("vllm.engine.arg_utils:EngineArgs.add_cli_args"))
        parser = add_cli_args(at("vllm.utils.argparse_utils:FlexibleArgumentParser")())
        options = {option: action for action in parser._actions for option in action.option_strings}
        assert options["--speculative-config"].type is not None
        assert "draft_model" in options["--spec-method"].choices
        assert {"--spec-tokens", "--spec-model"} <= set(options)


class TestPatches:
    @pytest.fixture(scope="class")
    def ledger(self) -> list[tuple[Any, str, Callable]]:
        """Every patch, as (owner, name, patch), none applied: the process's own and those of either runner."""
        patches = importlib.import_module("vllm_del.engine.patches")
        command_line = importlib.import_module("vllm_del.engine.command_line")
        del_config = importlib.import_module("vllm_del.config").DelConfig
        entries: list[tuple[Any, str, Callable]] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            for module in (patches, command_line):
                monkeypatch.setattr(module, "wrap", lambda *entry: entries.append(entry))
            patches.apply()
            command_line.apply_refusal("")
            patches._watch_workers()
            monkeypatch.setattr("vllm_del.engine.setup.check_target", lambda _: None)
            config = object.__new__(del_config)
            config.del_policy = "dynamic"
            for use_v2, kind in ((False, "cpu_worker:CPUWorker"), (True, "gpu_worker:Worker")):
                vllm_config = SimpleNamespace(speculative_config=config, use_v2_model_runner=use_v2)
                worker = object.__new__(at(f"vllm.v1.worker.{kind}"))
                worker.model_runner = object.__new__(at(RUNNER_V2 if use_v2 else RUNNER_V1))
                worker.model_runner.speculator = SimpleNamespace()
                patches._install_the_drafter(lambda _: None, SimpleNamespace(vllm_config=vllm_config, worker=worker))
        return entries

    def test_ledger_is_complete(self, ledger):
        """It is read by running it: these say that the reading works."""
        assert {f"{owner.__name__}.{name}" for owner, name, _ in ledger} >= {
            "EngineArgs.add_cli_args",
            "EngineArgs.create_engine_config",
            "EngineArgs.create_speculative_config",
            "WorkerWrapperBase.init_device",
            "CPUWorker.compile_or_warm_up_model",
            "Worker.compile_or_warm_up_model",
            "DraftModelProposer.__new__",
            "vllm.v1.worker.gpu.model_runner.init_speculator",
        }

    def test_patches_take_what_the_originals_take(self, ledger):
        problems = []
        for owner, name, patch in ledger:
            if not hasattr(owner, name):
                problems.append(f"{owner.__name__}.{name} is gone")
                continue
            original = getattr(owner, "__init__" if name == "__new__" else name)
            names = parameters(original)
            instance = names[:1] if names[0] == "self" else []
            try:
                inspect.signature(patch).bind(original, *names)
                inspect.signature(patch).bind(original, *instance, **dict.fromkeys(names[len(instance) :]))
            except TypeError as error:
                problems.append(f"{owner.__name__}.{name}: {error}")
        assert not problems

    def test_a_function_is_called_by_the_name_we_replace(self, ledger):
        """Through any other name, vLLM would reach the original."""
        functions = [(owner, name) for owner, name, _ in ledger if inspect.ismodule(owner)]
        assert functions
        for module, name in functions:
            assert name in {call.function for call in source.calls_in(module)}, f"{module.__name__}: {name}"

    def test_plugins_are_loaded_before_the_arguments_are_parsed(self):
        """`vllm serve` can know the word `del` only if they are."""
        lines = inspect.getsource(at("vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args"))
        assert lines.index("load_general_plugins()") < lines.index("EngineArgs.add_cli_args(parser)")

    @pytest.mark.parametrize(
        "function",
        ["vllm.engine.arg_utils:EngineArgs.__post_init__", "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker"],
    )
    def test_plugins_are_loaded_in_every_process(self, function: str):
        assert "load_general_plugins" in {call.function for call in source.calls_in(at(function))}

    def test_a_worker_knows_its_configuration_before_its_device(self):
        """`init_worker` stores it, `init_device` builds the runner."""
        worker = "vllm.v1.worker.worker_base:WorkerWrapperBase"
        stored = set(source.attributes_of_self(source.tree_of(at(f"{worker}.init_worker"))))
        assert ("vllm_config", False) in stored
        init_device = source.tree_of(inspect.unwrap(at(f"{worker}.init_device")))
        assert "self.worker.init_device" in {call.function for call in source.calls(init_device)}
