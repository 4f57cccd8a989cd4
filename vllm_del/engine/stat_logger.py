"""The vLLM side of our metrics: a logger that vLLM's manager of loggers calls beside its own."""

from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from vllm_del.config import DelConfig
from vllm_del.engine.messages import STATISTICS_KEY
from vllm_del.metrics import Metrics

logger = init_logger(f"vllm.{__name__}")


class DelStatLogger(AggregateStatLoggerBase):
    """Records what the schedulers of our own send with their statistics."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_indexes: list[int],
        *,
        counter: type = PrometheusStatLogger._counter_cls,
        logs: bool = True,
    ) -> None:
        config = vllm_config.speculative_config
        assert isinstance(config, DelConfig)
        name = vllm_config.model_config.served_model_name
        # Of several API servers each sees a part; vLLM's own line is left out there too.
        self._logs = logs
        self._metrics = Metrics(name, engine_indexes, config.exits, config.num_speculative_tokens, counter)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take our counts out of `scheduler_stats`, so that no other logger meets them."""
        if scheduler_stats is not None and STATISTICS_KEY in (scheduler_stats.kv_connector_stats or {}):
            self._metrics.observe(engine_idx, scheduler_stats.kv_connector_stats[STATISTICS_KEY])
            scheduler_stats.kv_connector_stats = None

    def log(self) -> None:
        """The periodic line."""
        if self._logs and (line := self._metrics.log_line()):
            logger.info(line)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the worker has said what will happen."""
