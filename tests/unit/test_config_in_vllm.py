"""What vLLM sees of a DelConfig, what it grants it, and what becomes of everybody else's configuration."""

import pickle

import pytest
from vllm.config import SpeculativeConfig
from vllm.config.utils import replace
from vllm.platforms import current_platform

from vllm_del.config import DelConfig


class TestInsideVllm:
    """What vLLM sees, and grants, once the configuration is built."""

    @pytest.mark.parametrize("num_tokens", [1, 4, 64])
    def test_is_a_draft_model_without_a_model(self, num_tokens, engine_config):
        vllm_config = engine_config(speculative_config={"method": "del", "num_speculative_tokens": num_tokens})
        config = vllm_config.speculative_config
        assert config.method == "draft_model"
        assert config.uses_draft_model()
        assert config.uses_draft_kv_cache()
        assert config.draft_model_config is vllm_config.model_config
        assert config.draft_parallel_config is vllm_config.parallel_config
        assert config.max_num_new_slots_for_drafting == 0
        assert vllm_config.num_speculative_tokens == num_tokens
        assert vllm_config.num_lookahead_tokens == num_tokens

    def test_keeps_the_prefix_cache_whole(self, engine_config):
        vllm_config = engine_config(speculative_config="del")
        assert not vllm_config.speculative_config.use_eagle()
        assert not vllm_config.speculative_config.use_eagle_block_drop()
        assert vllm_config.num_prefill_lookahead_tokens == 0

    @pytest.mark.parametrize(
        ("speculative_config", "expected"),
        [
            (None, True),
            ("del", True),
            # The control: a method that vLLM does switch asynchronous scheduling off for.
            ({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}, False),
        ],
    )
    def test_asynchronous_scheduling_stays_as_it_was(self, speculative_config, expected, engine_config, monkeypatch):
        """Looked at just before the CPU platform, the last to decide, switches it off for reasons of its own."""
        seen = []
        decide = current_platform.check_and_update_config

        def look_first(vllm_config):
            seen.append(vllm_config.scheduler_config.async_scheduling)
            decide(vllm_config)

        monkeypatch.setattr(current_platform, "check_and_update_config", look_first)
        engine_config(speculative_config=speculative_config)
        assert seen == [expected]

    def test_asynchronous_scheduling_may_be_asked_for(self, engine_config):
        """vLLM refuses it for a method it does not know to work with it."""
        engine_config(speculative_config="del", async_scheduling=True)
        ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
        with pytest.raises(ValueError, match=r"[Aa]sync scheduling"):
            engine_config(speculative_config=ngram, async_scheduling=True)

    def test_model_runner_v2_serves_it(self, engine_config):
        with_del = engine_config(speculative_config="del")
        without = engine_config()
        assert (
            with_del._get_v2_model_runner_unsupported_features() == without._get_v2_model_runner_unsupported_features()
        )

    def test_survives_vllm_rebuilding_its_configuration(self, engine_config):
        vllm_config = engine_config(speculative_config="del")
        for rebuilt in (replace(vllm_config, instance_id="other"), pickle.loads(pickle.dumps(vllm_config))):
            assert type(rebuilt.speculative_config) is DelConfig
            assert rebuilt.speculative_config == vllm_config.speculative_config

    def test_target_of_another_depth_changes_the_hash(self, engine_config):
        shallow = engine_config(speculative_config="del", hf_overrides={"num_hidden_layers": 6})
        deep = engine_config(speculative_config="del")
        assert shallow.speculative_config.compute_hash() != deep.speculative_config.compute_hash()

    def test_only_through_engine_args(self):
        with pytest.raises(ValueError, match="target_model_config is None: vLLM fills it in"):
            DelConfig()

    @pytest.mark.parametrize("method", ["ngram", "eagle"])
    def test_only_for_its_own_method(self, method):
        with pytest.raises(ValueError, match="method"):
            DelConfig(method=method)


class TestOtherMethods:
    """Installing the package changes nothing for anyone who does not ask for `del`."""

    def test_none_stays_none(self, engine_config):
        assert engine_config().speculative_config is None

    @pytest.mark.parametrize(
        "fields",
        [
            {"method": "ngram", "prompt_lookup_max": 3},
            {"method": "draft_model", "model": "llama"},
            {"model": "llama"},
        ],
    )
    def test_vllms_own_config_class(self, fields, models, engine_config):
        fields = {**fields, "num_speculative_tokens": 2}
        if "model" in fields:
            fields["model"] = models[fields["model"]]
        config = engine_config(speculative_config=fields).speculative_config
        assert type(config) is SpeculativeConfig
        assert config.num_speculative_tokens == 2

    def test_spec_method_flag(self, engine_config):
        config = engine_config(spec_method="ngram", spec_tokens=2, speculative_config={"prompt_lookup_max": 3})
        assert type(config.speculative_config) is SpeculativeConfig
        assert config.speculative_config.method == "ngram"

    def test_a_draft_model_still_gets_its_extra_slot(self, models, engine_config):
        fields = {"method": "draft_model", "model": models["llama"], "num_speculative_tokens": 2}
        assert engine_config(speculative_config=fields).speculative_config.max_num_new_slots_for_drafting == 1
