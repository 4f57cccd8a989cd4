"""What we rely on in vLLM, point by point: on a new vLLM the failures say what moved, and which file of ours minds.

The calls we make and the attributes we read on `self` come from our own source; the rest stands in tables here.
vLLM's things are named by strings, "module:name", and found when a test runs: one that is gone is one failure.
All of it is looked at, nothing is run on a model.
"""

import importlib
import inspect
from typing import get_args

import pytest

from tests.contract import source
from tests.contract.places import (
    ATTENTION,
    CLASS_IDS,
    EMBEDDING,
    OUR_CLASSES,
    PROPOSER,
    RUNNER_V1,
    RUNNER_V2,
    SPECULATOR,
    at,
    parameters,
)

MADE_BY_US = {"DraftGraphs", "Stage"}
"""Classes of ours that vLLM does not construct."""


class TestOurSide:
    def test_classes_are_found(self):
        assert {"DelConfig", "DelProposer", "DelSpeculator", "DelAsyncScheduler", "DelStatLogger"} <= set(CLASS_IDS)
        assert sum(len(cls.inherited_attributes()) for cls in OUR_CLASSES) > 30

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
        base = cls.base.resolve()
        missing = [name for name in sorted(cls.inherited_attributes()) if not source.has_attribute(base, name)]
        assert not missing, f"{cls.file} reads {missing} from self, which {cls.base.name} does not set any more"

    @pytest.mark.parametrize("cls", OUR_CLASSES, ids=CLASS_IDS)
    def test_methods_we_replace_take_what_vllm_passes(self, cls: source.OurClass):
        ours, base = cls.load(), cls.base.resolve()
        # What we make ourselves may be made otherwise.
        own = {"__init__"} if cls.name in MADE_BY_US else set()
        replaced = [name for name in cls.methods() - own if inspect.isfunction(getattr(base, name, None))]
        assert replaced or own
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
            ("vllm.distributed:tensor_model_parallel_all_gather", "input_ dim"),
            (
                "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
                "self target_model_config target_parallel_config",
            ),
            ("vllm.engine.arg_utils:EngineArgs.add_cli_args", "parser"),
            ("vllm.v1.worker.worker_base:WorkerWrapperBase.init_device", "self"),
            ("vllm.v1.worker.gpu.spec_decode:init_speculator", "vllm_config device req_states"),
            ("vllm.config:SchedulerConfig.get_scheduler_cls", "self"),
            ("vllm.sampling_params:SamplingParams._validate_spec_decode", "self speculative_config"),
            ("vllm.v1.metrics.loggers:StatLoggerManager.__init__", "self vllm_config"),
            ("vllm.v1.worker.gpu_worker:Worker.execute_model", "self scheduler_output"),
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
            ("vllm.v1.worker.worker_base:WorkerWrapperBase", "vllm_config worker", "engine/patches.py"),
            ("vllm.v1.worker.gpu_worker:Worker", "vllm_config model_runner", "engine/patches.py"),
            (RUNNER_V1, "drafter use_aux_hidden_state_outputs", "engine/patches.py"),
            (RUNNER_V2, "speculator use_aux_hidden_state_outputs", "engine/patches.py"),
            (
                RUNNER_V2,
                "vllm_config device req_states attn_groups decode_query_len lora_capture_cases ubatch_runner "
                "cudagraph_manager kv_connector execute_model_state step_timing",
                "engine/speculator.py, engine/verification.py",
            ),
            (
                "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager",
                "graphs decode_query_len _candidates _capture_descs",
                "engine/graphs.py, engine/verification.py",
            ),
            (
                "vllm.v1.worker.gpu.async_utils:StepTimingCollector",
                "collect forward_end drafter_start drafter_end",
                "engine/verification.py",
            ),
            ("vllm.v1.worker.gpu.async_utils:StepTimingSample", "forward_ms", "engine/verification.py"),
            ("vllm.v1.worker.gpu.input_batch:InputBatch", "max_query_len", "engine/faults.py"),
            (
                "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor",
                "cg_mode max_query_len num_tokens num_reqs",
                "engine/faults.py, engine/verification.py",
            ),
            ("vllm.config:ModelConfig", "model get_total_num_hidden_layers", "config.py"),
            ("vllm.config:ParallelConfig", "tensor_parallel_size", "config.py"),
            (
                "vllm.config:VllmConfig",
                "model_config parallel_config cache_config device_config lora_config kv_transfer_config "
                "speculative_config offload_config use_v2_model_runner weight_transfer_config",
                "engine/support.py",
            ),
            ("vllm.config.offload:OffloadConfig", "offload_backend prefetch", "engine/support.py"),
            ("vllm.config.offload:PrefetchOffloadConfig", "offload_group_size", "engine/support.py"),
            ("vllm.config:VllmConfig", "num_speculative_tokens scheduler_config compute_hash", "engine/measure.py"),
            ("vllm.config:SchedulerConfig", "max_num_seqs max_num_batched_tokens", "engine/measure.py"),
            ("vllm.config:ModelConfig", "get_hidden_size dtype max_model_len hf_config", "engine/rehearsal.py"),
            ("vllm.v1.kv_cache_interface:KVCacheConfig", "num_blocks", "engine/rehearsal.py"),
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
            (
                "vllm.v1.attention.backend:CommonAttentionMetadata",
                "seq_lens max_seq_len query_start_loc_cpu num_actual_tokens",
                "engine/proposer.py, engine/steps.py",
            ),
            ("vllm.v1.spec_decode.metadata:SpecDecodeMetadata", "num_draft_tokens", "engine/proposer.py"),
            (
                RUNNER_V1,
                "input_batch discard_request_mask effective_drafter_max_model_len",
                "engine/proposer.py",
            ),
            ("vllm.v1.utils:CpuGpuBuffer", "gpu", "engine/proposer.py"),
            (
                "vllm.v1.worker.gpu_input_batch:InputBatch",
                "block_table req_ids num_prompt_tokens num_computed_tokens_cpu num_tokens_no_spec",
                "engine/proposer.py, engine/steps.py",
            ),
            (
                "vllm.v1.worker.gpu_input_batch:InputBatch",
                "thinking_budget_state_holder",
                "engine/faults.py",
            ),
            (
                "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder",
                "in_spec_mode",
                "engine/faults.py",
            ),
            ("vllm.v1.worker.block_table:MultiGroupBlockTable", "block_tables", "engine/proposer.py"),
            ("vllm.v1.worker.block_table:BlockTable", "block_size get_device_tensor", "engine/proposer.py"),
            (
                "vllm.v1.worker.gpu.input_batch:InputBatch",
                "num_reqs req_ids idx_mapping idx_mapping_np seq_lens seq_lens_cpu_upper_bound query_start_loc "
                "input_ids num_tokens num_draft_tokens num_draft_tokens_per_req num_scheduled_tokens prefill_len_np "
                "num_computed_prefill_tokens_np has_prefill",
                "engine/speculator.py, engine/steps.py",
            ),
            ("vllm.v1.worker.gpu.states:RequestState", "prompt_len", "engine/speculator.py"),
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
            (
                f"{EMBEDDING}:ParallelLMHead",
                "quant_method bias shard_indices tp_size org_vocab_size num_added_embeddings "
                "num_embeddings_per_partition",
                "engine/head.py",
            ),
            (
                f"{EMBEDDING}:VocabParallelEmbeddingShardIndices",
                "num_org_elements org_vocab_start_index",
                "engine/head.py",
            ),
            (
                "vllm.model_executor.layers.logits_processor:LogitsProcessor",
                "soft_cap scale head_dtype",
                "engine/head.py",
            ),
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
