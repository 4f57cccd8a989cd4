"""Fixtures of the unit tests: tiny models, and vLLM's configuration of them."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import vllm.model_executor.models.registry as model_registry
import vllm.v1.worker.gpu.cudagraph_utils as cudagraph_utils
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from tests.unit.models import write_models
from vllm_del.config import DelConfig

EngineConfig = Callable[..., VllmConfig]


@pytest.fixture(scope="session", autouse=True)
def plugin() -> None:
    """What `vllm serve` and `EngineArgs()` do first; without it a test could run before the first `EngineArgs()`."""
    load_general_plugins()


@pytest.fixture(scope="session", autouse=True)
def _look_at_model_classes_in_this_process() -> Iterator[None]:
    """vLLM looks at a model class in a process of its own, 10 to 20 s, to keep CUDA out of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_registry, "_run_in_subprocess", lambda look: look())
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The path of each tiny model."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def engine_args(models: dict[str, str]) -> Callable[..., EngineArgs]:
    """`EngineArgs` of a tiny model, the 12-layer Llama unless `model` names another."""

    def build(model: str = "llama", **settings: Any) -> EngineArgs:
        return EngineArgs(model=models[model], skip_tokenizer_init=True, enforce_eager=True, **settings)

    return build


@pytest.fixture(scope="session")
def engine_config(engine_args: Callable[..., EngineArgs]) -> EngineConfig:
    """The `VllmConfig` that those `EngineArgs` make: some 5 ms."""

    def build(model: str = "llama", **settings: Any) -> VllmConfig:
        return engine_args(model, **settings).create_engine_config()

    return build


@pytest.fixture(scope="session")
def del_config(engine_config: EngineConfig) -> Callable[..., DelConfig]:
    """The `DelConfig` that `fields` give, on the 12-layer Llama."""

    def build(**fields: Any) -> DelConfig:
        config = engine_config(speculative_config={"method": "del", **fields}).speculative_config
        assert isinstance(config, DelConfig)
        return config

    return build


@pytest.fixture
def graph_config(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What vLLM's managers of CUDA graphs go by, where there is no GPU to record any: `graph_config(sizes, rows)`."""
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)

    def build(sizes: list[int], rows: int) -> Any:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=rows),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes)),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
            speculative_config=None,
        )

    return build
