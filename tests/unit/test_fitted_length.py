"""`--max-model-len auto`: vLLM fits the longest length to the memory it finds, after the drafter is built.

The scheduler reserves no KV slot past the fitted length. A drafter that goes on to the length it was built with takes
its slots from what earlier sequences left in the block table: blocks that may be another sequence's by now.
"""

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import KVCacheConfig

import vllm_del.draft.loop
import vllm_del.engine.proposer
import vllm_del.engine.speculator
from vllm_del.draft.decide import FixedPolicy

CPU = torch.device("cpu")
FITTED = 100


@pytest.fixture
def vllm_config(engine_config) -> VllmConfig:
    """That of a worker, which vLLM changes as the fitted length becomes known."""
    vllm_config = copy.deepcopy(engine_config(speculative_config="del", max_model_len=-1))
    assert vllm_config.model_config.max_model_len > FITTED
    return vllm_config


def drafted_length(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the drafting itself, and note the longest length it is given."""
    signature, seen = inspect.signature(vllm_del.draft.loop.draft), []
    monkeypatch.setattr(
        module, "draft", lambda *args, **kwargs: seen.append(signature.bind(*args, **kwargs).arguments["max_model_len"])
    )
    return seen


def test_v2(vllm_config, monkeypatch):
    seen = drafted_length(vllm_del.engine.speculator, monkeypatch)
    speculator = vllm_del.engine.speculator.DelSpeculator(vllm_config, CPU)
    speculator.segments, speculator.head, speculator.policy = [], None, FixedPolicy(4)
    speculator.counted = None
    vllm_config.model_config.max_model_len = FITTED  # as GPUWorker.update_max_model_len does

    lengths = torch.tensor([3, 4], dtype=torch.int32)
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "b"],
        idx_mapping=torch.arange(2),
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_scheduled_tokens=lengths.numpy(),
        num_computed_prefill_tokens_np=0 * lengths.numpy(),
        prefill_len_np=lengths.numpy(),
    )
    ones, zeros = torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    last_sampled = torch.zeros(speculator.max_num_reqs, 1, dtype=torch.int64)
    speculator.kv_cache_config = KVCacheConfig(num_blocks=0, kv_cache_tensors=[], kv_cache_groups=[])
    speculator.block_tables = SimpleNamespace(
        input_block_tables=[], block_sizes=[], slot_mappings=torch.zeros(0, 2, dtype=torch.int64)
    )
    speculator.propose(batch, {}, {}, torch.empty(0), None, ones, zeros, last_sampled, is_profile=True)
    assert seen == [FITTED]


def test_v1(vllm_config, monkeypatch):
    seen = drafted_length(vllm_del.engine.proposer, monkeypatch)
    runner = SimpleNamespace(
        max_model_len=vllm_config.model_config.max_model_len,
        discard_request_mask=SimpleNamespace(gpu=torch.zeros(2, dtype=torch.bool)),
        input_batch=SimpleNamespace(req_ids=["a", "b"], block_table=SimpleNamespace(block_tables=[])),
    )
    with set_current_vllm_config(vllm_config):
        # Once a test has put a `__new__` on its base and taken it away again, CPython takes no arguments to it.
        proposer = object.__new__(vllm_del.engine.proposer.DelProposer)
        proposer.__init__(vllm_config, CPU, runner)
    proposer.segments, proposer.head, proposer.policy = [], None, FixedPolicy(4)
    proposer.counted = None
    proposer._draft_attn_layer_names = set()
    proposer.initialize_attn_backend(KVCacheConfig(num_blocks=0, kv_cache_tensors=[], kv_cache_groups=[]))
    proposer.initialize_cudagraph_keys(CUDAGraphMode.NONE)
    vllm_config.model_config.max_model_len = runner.max_model_len = FITTED  # as GPUWorker.update_max_model_len does

    none = torch.empty(0)
    metadata = SimpleNamespace(seq_lens=torch.tensor([3, 4], dtype=torch.int32), max_seq_len=4)
    proposer.propose(4, none, none, none, torch.tensor([1, 2], dtype=torch.int32), None, metadata)
    assert seen == [FITTED]
