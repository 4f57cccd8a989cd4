"""What we rely on in vLLM, point by point: on a new vLLM the failures say what moved, and which file of ours minds.

The calls we make and the attributes we read on `self` come from our own source; the rest stands in tables here.
vLLM's things are named by strings, "module:name", and found when a test runs: one that is gone is one failure.
All of it is looked at, nothing is run on a model.
"""

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import reduce
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from tests.contract import source

OUR_CLASSES = source.our_classes()
CLASS_IDS = [ours.name for ours in OUR_CLASSES]

RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
PROPOSER = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
ATTENTION = "vllm.v1.worker.gpu.attn_utils"


def at(place: str) -> Any:
    """The thing at "module:name", or a failed test."""
    module, _, name = place.partition(":")
    try:
        return reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{place} is gone: {error}")


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def ours(name: str) -> type:
    """Our class of this name."""
    (found,) = (cls for cls in OUR_CLASSES if cls.name == name)
    return found.load()


class TestOurSide:
    def test_classes_are_found(self):
        assert {"DelConfig", "DelProposer", "DelSpeculator"} <= set(CLASS_IDS)

    @pytest.mark.parametrize("file", source.our_files())
    def test_calls_to_what_we_import(self, file: str):
        theirs = {found.known_as: found for found in source.imports_from_vllm(file)}
        for call in source.calls(source.our_files()[file]):
            if call.function in theirs:
                assert (misfit := call.misfit(theirs[call.function].resolve())) is None, misfit

    @pytest.mark.parametrize("cls", OUR_CLASSES, ids=CLASS_IDS)
    def test_calls_to_what_we_inherit(self, cls: source.OurClass):
        loaded = cls.load()
        for call in source.calls(cls.tree):
            owner, _, name = call.function.rpartition(".")
            if owner == "super()":
                function = getattr(super(loaded, loaded), name)
            elif owner == "self" and inspect.isfunction(getattr(loaded, name, None)):
                function = getattr(loaded, name)
            else:
                continue
            assert (misfit := call.misfit(function, is_bound=True)) is None, misfit

    @pytest.mark.parametrize("cls", OUR_CLASSES, ids=CLASS_IDS)
    def test_attributes_we_inherit(self, cls: source.OurClass):
        assert cls.inherited_attributes(), "the reading finds none"
        base = cls.base.resolve()
        missing = [name for name in sorted(cls.inherited_attributes()) if not source.has_attribute(base, name)]
        assert not missing, f"{cls.file} reads {missing} from self, which {cls.base.name} does not set any more"

    @pytest.mark.parametrize("cls", OUR_CLASSES, ids=CLASS_IDS)
    def test_methods_we_replace_take_what_vllm_passes(self, cls: source.OurClass):
        ours, base = cls.load(), cls.base.resolve()
        replaced = [name for name in cls.methods() if inspect.isfunction(getattr(base, name, None))]
        assert replaced
        for name in replaced:
            theirs = parameters(getattr(base, name))
            signature = inspect.signature(getattr(ours, name))
            signature.bind(*[None] * len(theirs))
            signature.bind(None, **dict.fromkeys(theirs[1:]))
            by_position = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            assert by_position == theirs[: len(by_position)], f"the order of {cls.name}.{name}"

    @pytest.mark.parametrize("cls", OUR_CLASSES, ids=CLASS_IDS)
    def test_nothing_abstract_is_left(self, cls: source.OurClass):
        assert not inspect.isabstract(cls.load())


class TestFunctions:
    @pytest.mark.parametrize(
        ("function", "order"),
        [
            (f"{ATTENTION}:build_slot_mappings_by_layer", "slot_mappings kv_cache_config"),
            (f"{ATTENTION}:init_attn_backend", "kv_cache_config vllm_config device"),
            ("vllm.forward_context:set_forward_context", "attn_metadata vllm_config"),
            (f"{PROPOSER}.__init__", "self vllm_config device runner"),
            (f"{PROPOSER}._determine_batch_execution_and_padding", "self num_tokens"),
            (f"{SPECULATOR}.__init__", "self vllm_config device"),
            (
                f"{SPECULATOR}._build_uniform_attn_metadata",
                "self batch_desc num_reqs num_query_per_req seq_lens_cpu_upper_bound step",
            ),
            (f"{SPECULATOR}._build_uniform_batch_dp_sync", "self target_dp_sync_state num_reqs"),
            ("vllm.v1.worker.block_table:BlockTable.get_device_tensor", "self num_reqs"),
            (
                "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
                "self target_model_config target_parallel_config",
            ),
            ("vllm.engine.arg_utils:EngineArgs.add_cli_args", "parser"),
            ("vllm.v1.worker.worker_base:WorkerWrapperBase.init_device", "self"),
            ("vllm.v1.worker.gpu.spec_decode:init_speculator", "vllm_config device req_states"),
        ],
    )
    def test_parameters_by_position(self, function: str, order: str):
        assert parameters(at(function))[: len(order.split())] == order.split()

    @pytest.mark.parametrize(
        ("function", "length"),
        [
            (f"{ATTENTION}:init_attn_backend", 3),
            (f"{PROPOSER}._determine_batch_execution_and_padding", 3),
            (f"{SPECULATOR}._build_uniform_batch_dp_sync", 2),
        ],
    )
    def test_results_we_unpack(self, function: str, length: int):
        assert len(get_args(inspect.signature(at(function)).return_annotation)) == length

    def test_slot_that_writes_nothing(self):
        kernels = importlib.import_module("vllm_del.kernels.advance_rows")
        assert at("vllm.v1.attention.backends.utils:PAD_SLOT_ID") == kernels.PAD_SLOT


class TestAttributes:
    """Of vLLM's objects that reach us."""

    @pytest.mark.parametrize(
        ("cls", "names", "used_by"),
        [
            (
                "vllm.engine.arg_utils:EngineArgs",
                "speculative_config spec_method spec_model spec_tokens create_engine_config",
                "engine/patches.py",
            ),
            ("vllm.v1.worker.worker_base:WorkerWrapperBase", "vllm_config", "engine/patches.py"),
            ("vllm.config:ModelConfig", "model get_total_num_hidden_layers", "config.py"),
            ("vllm.config:ParallelConfig", "tensor_parallel_size", "config.py"),
            (
                "vllm.config:VllmConfig",
                "model_config parallel_config cache_config device_config lora_config kv_transfer_config "
                "speculative_config use_v2_model_runner",
                "engine/support.py",
            ),
            (
                "vllm.config:ModelConfig",
                "model architectures runner_type is_encoder_decoder is_multimodal_model use_mla is_hybrid "
                "is_attention_free is_diffusion",
                "engine/support.py",
            ),
            (
                "vllm.config:ParallelConfig",
                "pipeline_parallel_size decode_context_parallel_size prefill_context_parallel_size enable_eplb "
                "use_ubatching",
                "engine/support.py",
            ),
            ("vllm.config:CacheConfig", "kv_sharing_fast_prefill", "engine/support.py"),
            ("vllm.config:DeviceConfig", "device_type", "engine/support.py"),
            (
                "vllm.model_executor.layers.attention:Attention",
                "layer_name kv_sharing_target_layer_name",
                "engine/layers.py",
            ),
            ("vllm.config:ParallelConfig", "data_parallel_size", "engine/proposer.py"),
            ("vllm.v1.kv_cache_interface:KVCacheConfig", "kv_cache_groups", "engine/proposer.py"),
            ("vllm.v1.attention.backend:CommonAttentionMetadata", "seq_lens max_seq_len", "engine/proposer.py"),
            (
                RUNNER_V1,
                "input_batch discard_request_mask effective_drafter_max_model_len",
                "engine/proposer.py",
            ),
            ("vllm.v1.utils:CpuGpuBuffer", "gpu", "engine/proposer.py"),
            ("vllm.v1.worker.gpu_input_batch:InputBatch", "block_table", "engine/proposer.py"),
            ("vllm.v1.worker.block_table:MultiGroupBlockTable", "block_tables", "engine/proposer.py"),
            ("vllm.v1.worker.block_table:BlockTable", "block_size get_device_tensor", "engine/proposer.py"),
            (
                "vllm.v1.worker.gpu.input_batch:InputBatch",
                "num_reqs idx_mapping seq_lens seq_lens_cpu_upper_bound",
                "engine/speculator.py",
            ),
            (
                "vllm.v1.worker.gpu.input_batch:InputBuffers",
                "input_ids positions seq_lens query_start_loc",
                "engine/speculator.py",
            ),
            (
                "vllm.v1.worker.gpu.block_table:BlockTables",
                "input_block_tables block_sizes slot_mappings",
                "engine/speculator.py",
            ),
            ("vllm.v1.worker.gpu.dp_utils:DPSyncState", "num_tokens_across_dp", "engine/speculator.py"),
        ],
    )
    def test_exist(self, cls: str, names: str, used_by: str):
        found = at(cls)
        missing = [name for name in names.split() if not source.has_attribute(found, name)]
        assert not missing, f"vllm_del/{used_by} reads {missing} of {cls}"

    def test_a_missing_one_would_be_seen(self):
        assert not source.has_attribute(at("vllm.v1.worker.gpu.block_table:BlockTables"), "block_table")

    def test_types_that_a_draft_step_writes(self):
        import torch

        buffers = at("vllm.v1.worker.gpu.input_batch:InputBuffers")(
            max_num_reqs=2, max_num_tokens=8, device=torch.device("cpu")
        )
        assert buffers.input_ids.dtype == buffers.seq_lens.dtype == buffers.query_start_loc.dtype == torch.int32
        assert buffers.positions.dtype == torch.int64
        assert buffers.query_start_loc.shape == (3,)


class TestV2Runner:
    """How it makes its speculator, and what it calls on it."""

    def calls(self, function: str) -> list[source.Call]:
        found = [call for call in source.calls_in(at(RUNNER_V2)) if call.function == function]
        assert found, f"{RUNNER_V2} calls {function} no more"
        return found

    def test_makes_its_speculator_by_the_name_we_patch(self):
        (call,) = self.calls("init_speculator")
        assert call.positional == ("self.vllm_config", "self.device", "self.req_states")
        assert not call.keywords

    def test_calls_what_our_speculator_has(self):
        for name in ("load_model", "set_attn", "init_cudagraph_manager", "capture", "propose"):
            for call in self.calls(f"self.speculator.{name}"):
                method = getattr(ours("DelSpeculator"), name)
                assert (misfit := call.misfit(method, is_bound=True)) is None, misfit

    def test_order_of_what_propose_gets(self):
        (call,) = (call for call in self.calls("self.speculator.propose") if call.positional)
        assert call.positional[0] == "input_batch"
        assert call.positional[5:8] == ("num_sampled", "num_rejected", "self.req_states.last_sampled_tokens")
        mine = parameters(ours("DelSpeculator").propose)
        assert [mine[i] for i in (1, 6, 7, 8)] == ["input_batch", "num_sampled", "num_rejected", "last_sampled"]

    def test_what_propose_needs_comes_by_keyword(self):
        """A positional one would be lost in our `*_`, one of another name in our `**__`."""
        needed = {"num_speculative_tokens", "dp_sync_state", "dummy_run", "skip_attn_for_dummy_run"}
        assert needed <= {keyword for call in self.calls("self.speculator.propose") for keyword in call.keywords}
        assert needed <= set(parameters(ours("DelSpeculator").propose))

    def test_drops_what_was_drafted_beyond_the_scheduled_length(self):
        assert "draft_tokens[:, num_spec_tokens:] = -1" in inspect.getsource(at(RUNNER_V2))


class TestV1Runner:
    """How it makes its proposer, and what it calls on it; the CPU's runner inherits all that."""

    def calls(self, function: str) -> list[source.Call]:
        found = [call for call in source.calls_in(at(RUNNER_V1)) if call.function == function]
        assert found, f"{RUNNER_V1} calls {function} no more"
        return found

    def test_is_what_the_cpu_runner_is(self):
        assert issubclass(at("vllm.v1.worker.cpu_model_runner:CPUModelRunner"), at(RUNNER_V1))

    def test_makes_its_proposer_by_the_class_we_patch(self):
        (call,) = self.calls("DraftModelProposer")
        assert not call.positional
        assert set(call.keywords) == {"vllm_config", "device", "runner"}
        assert at("vllm.v1.worker.gpu_model_runner:DraftModelProposer") is at(PROPOSER)

    def test_calls_what_our_proposer_has(self):
        for name in ("load_model", "initialize_attn_backend", "dummy_run"):
            for call in self.calls(f"self.drafter.{name}"):
                method = getattr(ours("DelProposer"), name)
                assert (misfit := call.misfit(method, is_bound=True)) is None, misfit

    def test_what_propose_gets(self):
        """The other drafters get other arguments."""
        (call,) = (call for call in self.calls("self.drafter.propose") if "target_token_ids" in call.keywords)
        assert (misfit := call.misfit(ours("DelProposer").propose, is_bound=True)) is None, misfit
        needed = {"num_speculative_tokens", "next_token_ids", "common_attn_metadata", "num_rejected_tokens_gpu"}
        assert needed <= set(call.keywords)
        assert needed <= set(parameters(ours("DelProposer").propose))

    def test_longest_length_of_a_drafter_is_the_attribute_we_set(self):
        """Made before `load_model`, so that ours is the last word, and read where a batch is about to be drafted."""
        name = "effective_drafter_max_model_len"
        made = set(source.attributes_of_self(source.tree_of(at(f"{RUNNER_V1}.__init__"))))
        used = set(source.attributes_of_self(source.tree_of(at(f"{RUNNER_V1}._input_fits_in_drafter"))))
        assert (name, False) in made, f"{RUNNER_V1} does not set {name} any more"
        assert (name, True) in used, f"{RUNNER_V1}._input_fits_in_drafter does not read {name} any more"

    def test_rows_in_prefill_are_told_by_the_mask_we_read(self):
        for call in self.calls("self.drafter.prepare_next_token_ids_padded"):
            assert "self.discard_request_mask.gpu" in call.positional


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
            for use_v2 in (False, True):
                vllm_config = SimpleNamespace(speculative_config=object.__new__(del_config), use_v2_model_runner=use_v2)
                patches._install_the_drafter(lambda worker: None, SimpleNamespace(vllm_config=vllm_config))
        return entries

    def test_ledger_is_complete(self, ledger):
        """It is read by running it: these say that the reading works."""
        assert {f"{owner.__name__}.{name}" for owner, name, _ in ledger} >= {
            "EngineArgs.add_cli_args",
            "EngineArgs.create_engine_config",
            "EngineArgs.create_speculative_config",
            "WorkerWrapperBase.init_device",
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
