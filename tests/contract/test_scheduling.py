"""What our schedulers, and what travels with their steps, count on in vLLM."""

import inspect
from dataclasses import fields, is_dataclass

import pytest

from tests.contract import source
from tests.contract.places import at, parameters

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"


class TestKvCache:
    def test_how_slots_are_allocated(self):
        """Our function stands in the place of the manager's, and calls it."""
        assert parameters(at(f"{MANAGER}.allocate_slots"))[:5] == (
            ["self", "request", "num_new_tokens", "num_new_computed_tokens", "new_computed_blocks"]
        )
        by_name = {"num_lookahead_tokens", "num_external_computed_tokens", "reserved_blocks"}
        assert by_name <= set(parameters(at(f"{MANAGER}.allocate_slots")))
        calls = [call for call in source.calls_in(at(SCHEDULER)) if call.function.endswith(".allocate_slots")]
        assert {call.function for call in calls} == {"self.kv_cache_manager.allocate_slots"}
        assert len(calls) >= 2
        for call in calls:
            assert call.positional[:1] == ("request",)
            assert len(call.positional) <= 4
            assert not by_name & set(parameters(at(f"{MANAGER}.allocate_slots"))[: 1 + len(call.positional)])
        running, *_ = calls
        assert "num_lookahead_tokens" in running.keywords

    def test_which_blocks_a_request_holds(self):
        manager = at("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager")
        for name in ("req_to_blocks", "block_size"):
            assert source.has_attribute(manager, name)
        coordinator = at("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator")
        assert source.has_attribute(coordinator, "single_type_managers")


class TestSteps:
    @pytest.mark.parametrize(
        ("cls", "names"),
        [
            (SCHEDULER, "num_spec_tokens max_num_running_reqs kv_cache_manager running waiting requests current_step"),
            (SCHEDULER, "log_stats dynamic_sd_lookup make_stats update_draft_token_ids _update_after_schedule"),
            ("vllm.v1.request:Request", "request_id status num_computed_tokens num_tokens num_output_tokens"),
            ("vllm.v1.request:Request", "num_output_placeholders max_tokens is_prefill_chunk spec_token_ids"),
            ("vllm.v1.request:Request", "sampling_params"),
            ("vllm.sampling_params:SamplingParams", "extra_args"),
            ("vllm.v1.worker.gpu.async_utils:AsyncOutput", "model_runner_output"),
            ("vllm.v1.metrics.loggers:StatLoggerManager", "stat_loggers engine_indexes"),
            ("vllm.config:SchedulerConfig", "scheduler_cls async_scheduling"),
            ("vllm.config:ModelConfig", "served_model_name"),
        ],
    )
    def test_attributes(self, cls: str, names: str):
        found = at(cls)
        missing = [name for name in names.split() if not source.has_attribute(found, name)]
        assert not missing, f"engine/scheduler.py, engine/patches.py or engine/stat_logger.py reads {missing} of {cls}"

    def test_a_step_ends_with_what_we_override(self):
        text = inspect.getsource(at(f"{SCHEDULER}.schedule"))
        assert text.rindex("self._update_after_schedule(scheduler_output)") > text.rindex("allocate_slots")
        assert "num_new_tokens" in text

    def test_a_new_request_is_filled_up_with_drafts_unless_there_is_a_table(self):
        """Of lengths by batch size, which is how our schedulers say that there is nothing to fill up."""
        text = inspect.getsource(at(f"{SCHEDULER}.schedule"))
        assert "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None" in text
        assert "num_spec_tokens_to_schedule = self.dynamic_sd_lookup[\n" in text
        assert text.count("dynamic_sd_lookup") == 3

    def test_placeholders_of_an_asynchronous_step_are_set_where_we_set_ours(self):
        text = inspect.getsource(at(f"{ASYNC_SCHEDULER}._update_after_schedule"))
        assert "if request.is_prefill_chunk:\n                continue" in text
        assert "request.spec_token_ids = self._spec_token_placeholders" in text

    def test_what_we_attach_can_be_attached(self):
        for name in ("vllm.v1.core.sched.output:SchedulerOutput", "vllm.v1.outputs:ModelRunnerOutput"):
            cls = at(name)
            assert is_dataclass(cls)
            assert not hasattr(cls, "__slots__"), f"{name} takes no attribute of ours"

    def test_drafts_come_back_as_lists(self):
        assert [field.name for field in fields(at("vllm.v1.outputs:DraftTokenIds"))] == ["req_ids", "draft_token_ids"]


class TestStatistics:
    def test_the_field_that_our_counts_travel_in(self):
        (field,) = (f for f in fields(at("vllm.v1.metrics.stats:SchedulerStats")) if f.name == "kv_connector_stats")
        assert "dict" in str(field.type)

    def test_every_logger_of_the_manager_is_called_in_its_order(self):
        manager = at("vllm.v1.metrics.loggers:StatLoggerManager")
        for name in ("record", "log"):
            assert " in self.stat_loggers:" in inspect.getsource(getattr(manager, name))

    def test_the_class_of_counters_is_its_loggers(self):
        """Prometheus's, or those that Ray exports, which are made and counted up like them."""
        logger = at("vllm.v1.metrics.loggers:PrometheusStatLogger")
        wrapper = at("vllm.v1.metrics.ray_wrappers:RayCounterWrapper")
        assert at("vllm.v1.metrics.ray_wrappers:RayPrometheusStatLogger")._counter_cls is wrapper
        assert logger._counter_cls.__name__ == "Counter"
        assert parameters(wrapper.__init__)[1:] == ["name", "documentation", "labelnames"]
        assert list(inspect.signature(wrapper.labels).parameters)[:2] == ["self", "labels"]
        assert parameters(wrapper.inc)[1:] == ["value"]

    def test_a_request_is_asked_about_where_it_comes_in(self):
        verify = inspect.getsource(at("vllm.sampling_params:SamplingParams.verify"))
        assert "self._validate_spec_decode(speculative_config)" in verify
