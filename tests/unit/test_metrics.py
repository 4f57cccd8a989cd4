"""The metrics and the line of the log say what was counted."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_del.engine import stat_logger
from vllm_del.engine.messages import STATISTICS_KEY
from vllm_del.engine.stat_logger import DelStatLogger
from vllm_del.metrics import REASONS, Metrics

COUNTS = {
    "drafted": [10.0, 30.0],
    "accepted": [4.0, 27.0],
    "tried": [8.0, 28.0],
    "expected": [5.0, 25.0],
    "lengths": [10.0, 0.0, 5.0, 10.0],
    "planned_seconds": 2.0,
    "measured_seconds": 2.5,
}
COUNTED = {"counts": [COUNTS, COUNTS], "does_not_pay": 4, "no_room": 3, "not_wanted": 2, "ends": 1}
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    unregister_vllm_metrics()
    yield Metrics("model", [0, 1], exits=[2, 4], max_length=3)
    unregister_vllm_metrics()


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"vllm:del_{name}_total", {"model_name": "model", "engine": "1", **labels})


def test_counters(metrics: Metrics) -> None:
    metrics.observe(1, COUNTED)
    assert value("drafted_tokens", exit_layer="2") == 20
    assert value("accepted_tokens", exit_layer="4") == 54
    assert value("tried_tokens", exit_layer="4") == 56
    assert value("expected_accepted_tokens", exit_layer="2") == 10
    assert [value("drafts", length=str(length)) for length in range(4)] == [20, 0, 10, 20]
    reasons = [value("rounds_without_draft", reason=r) for r in REASONS]
    # Where there was no room either, and where there was.
    assert reasons == [24, 3, 2, 1]
    assert (value("planned_seconds"), value("measured_seconds")) == (4, 5)
    assert value("drafted_tokens", exit_layer="2", engine="0") == 0


def test_the_line_of_the_log_is_of_what_is_new(metrics: Metrics) -> None:
    assert metrics.log_line() is None
    metrics.observe(0, COUNTED)
    assert metrics.log_line() == (
        "del: 50% of rounds drafted, 40% does not pay, 5% no room, 3% not wanted, 2% ends, "
        "2.7 tokens a draft (25% after layer 2, 75% after layer 4), 78% accepted, "
        "acceptance rate 0.86 (expected 0.83), rounds took 1.25 of the time planned"
    )
    assert metrics.log_line() is None
    metrics.observe(0, {"counts": [], "not_wanted": 4})
    assert metrics.log_line() == "del: 0% of rounds drafted, 100% not wanted"


class TestInVllm:
    @pytest.fixture(autouse=True)
    def clean(self) -> Iterator[None]:
        yield
        unregister_vllm_metrics()

    def test_with_del_counts_go_to_our_logger_and_no_other(self, engine_config) -> None:
        manager = StatLoggerManager(engine_config(speculative_config="del"))
        ours, *others = manager.stat_loggers
        assert isinstance(ours, DelStatLogger)
        seen = []
        for other in others:
            other.record = lambda stats, *_, **__: seen.append(stats.kv_connector_stats)
        counts = {**COUNTS, "drafted": [1.0] * 4, "accepted": [1.0] * 4, "tried": [1.0] * 4, "expected": [1.0] * 4}
        exits = len(ours._metrics._exits)
        counts = {
            name: values[:exits] if name in ("drafted", "accepted", "tried", "expected") else values
            for name, values in counts.items()
        } | {"lengths": [1.0] * 7}
        manager.record(SchedulerStats(kv_connector_stats={STATISTICS_KEY: {"counts": [counts]}}), None)
        assert seen == [None] * len(others)
        assert b'vllm:del_drafts_total{engine="0",length="2"' in generate_latest()

    def test_they_are_counters_of_the_kind_that_vllm_uses(self, engine_config) -> None:
        """Started by Ray it counts in Ray's own, which are in no registry of Prometheus in this process."""
        made = []

        class OfRay(PrometheusStatLogger._counter_cls):
            def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
                made.append(name)
                super().__init__(name, *args, **kwargs, registry=CollectorRegistry())

        class ForRay(PrometheusStatLogger):
            _counter_cls = OfRay

        StatLoggerManager(engine_config(speculative_config="del"), custom_stat_loggers=[ForRay])
        assert {"vllm:generation_tokens", "vllm:del_drafted_tokens", "vllm:del_measured_seconds"} <= set(made)
        assert b"vllm:del_" not in generate_latest()

    @pytest.mark.parametrize(("servers", "lines"), [(1, 1), (2, 0)])
    def test_of_several_api_servers_none_logs_its_part(
        self, servers: int, lines: int, engine_config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours, *_ = StatLoggerManager(engine_config(speculative_config="del"), client_count=servers).stat_loggers
        said: list[str] = []
        monkeypatch.setattr(stat_logger.logger, "info", said.append)
        ours.record(SchedulerStats(kv_connector_stats={STATISTICS_KEY: {"counts": [], "not_wanted": 4}}), None)
        ours.log()
        assert said == ["del: 0% of rounds drafted, 100% not wanted"] * lines

    def test_a_fixed_policy_counts_nothing_and_says_nothing(self, engine_config) -> None:
        fixed = {"method": "del", "del_policy": "fixed", "del_exit_layers": 1}
        manager = StatLoggerManager(engine_config(speculative_config=fixed))
        assert not any(isinstance(logger, DelStatLogger) for logger in manager.stat_loggers)

    def test_without_del_there_is_none(self, engine_config) -> None:
        StatLoggerManager(engine_config(speculative_config="del"))
        manager = StatLoggerManager(engine_config())
        assert not any(isinstance(logger, DelStatLogger) for logger in manager.stat_loggers)
        assert b"vllm:del_" not in generate_latest()


def test_the_dashboard_asks_for_metrics_that_exist(metrics: Metrics) -> None:
    asked = set(re.findall(r"vllm:\w+", DASHBOARD.read_text()))
    there = set(re.findall(r"^(vllm:\w+)", generate_latest().decode(), re.MULTILINE))
    stock = {"vllm:generation_tokens_total", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"}
    assert {name for name in asked if name.startswith("vllm:del_")} <= there
    assert {name for name in asked if not name.startswith("vllm:del_")} <= stock | {
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    }
    assert {name for name in there if name.endswith("_total")} <= asked, "a metric that no panel shows"
    assert json.loads(DASHBOARD.read_text())["panels"]
