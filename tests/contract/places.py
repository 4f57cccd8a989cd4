"""What the contract tests share: how vLLM's things are named and found."""

import importlib
import inspect
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest

from tests.contract import source

OUR_CLASSES = source.our_classes()
CLASS_IDS = [ours.name for ours in OUR_CLASSES]

RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
PROPOSER = "vllm.v1.spec_decode.draft_model:DraftModelProposer"
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
ATTENTION = "vllm.v1.worker.gpu.attn_utils"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"


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
