"""What `del` cannot serve is refused at start-up, in one error that says which setting, and what to do."""

import copy

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_del.config import DelConfig
from vllm_del.engine.support import check_supported

HEADER = "The speculative method 'del' cannot serve this configuration:"
FOOTER = "Change it as said, or start without --speculative-config del."


def problems(error: BaseException) -> list[str]:
    """The lines of the refusal that name a problem."""
    first, *lines, last = str(error).splitlines()
    assert (first, last) == (HEADER, FOOTER)
    assert all(line.startswith("- ") for line in lines)
    return [line.removeprefix("- ") for line in lines]


def assert_one_problem(error: BaseException, words: list[str]) -> None:
    (problem,) = problems(error)
    for word in words:
        assert word in problem


KV_CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"enable_lora": True}, ["enable_lora=True", "merge the adapter"]),
        ({"pipeline_parallel_size": 2}, ["pipeline_parallel_size=2", "set it to 1"]),
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
            ["decode_context_parallel_size=2", "set it to 1"],
        ),
        ({"kv_transfer_config": KV_CONNECTOR}, ["kv_transfer_config", "leave it out"]),
        ({"offload_group_size": 4, "offload_backend": "prefetch"}, ["offload_group_size=4", "use cpu_offload_gb"]),
        ({"kv_sharing_fast_prefill": True}, ["kv_sharing_fast_prefill=True", "set it to False"]),
        ({"enable_prompt_embeds": True}, ["enable_prompt_embeds=True", "leave it out"]),
        ({"runner": "pooling"}, ["runner='pooling'", "serve it without 'del'"]),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_settings(settings, words, engine_config):
    assert engine_config(**settings).speculative_config is None, "vLLM itself serves this"
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        engine_config(speculative_config="del", **settings)
    assert_one_problem(error.value, words)


def test_a_draft_vocabulary_on_several_ranks(engine_config):
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        engine_config(speculative_config={"method": "del", "del_draft_vocab": 64}, tensor_parallel_size=2)
    assert_one_problem(error.value, ["del_draft_vocab=64 with tensor_parallel_size=2"])


@pytest.mark.parametrize("field", [{"del_draft_vocab": 64}, {"del_draft_head": "fp8"}])
def test_copies_beside_weights_that_are_put_away(field, engine_config, monkeypatch):
    monkeypatch.setattr("vllm.platforms.cpu.CpuPlatform.is_sleep_mode_available", lambda self: True)
    engine_config(speculative_config="del", enable_sleep_mode=True)
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        engine_config(speculative_config={"method": "del", **field}, enable_sleep_mode=True)
    ((name, value),) = field.items()
    assert_one_problem(error.value, [f"{name}={value!r} with enable_sleep_mode=True"])


def test_a_copy_of_weights_that_change(engine_config):
    given = {"weight_transfer_config": {"backend": "nccl"}}
    engine_config(speculative_config="del", **given)
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        engine_config(speculative_config={"method": "del", "del_draft_head": "fp8"}, **given)
    assert_one_problem(error.value, ["del_draft_head='fp8' with weight_transfer_config"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("multimodal", ["Qwen2AudioForConditionalGeneration", "multimodal", "text-only"]),
        ("mla", ["DeepseekV2ForCausalLM", "(MLA)", "ordinary attention"]),
        ("recurrent", ["MambaForCausalLM", "recurrent", "pure transformer"]),
        ("hybrid", ["JambaForCausalLM", "recurrent", "pure transformer"]),
        ("encoder", ["runner='pooling'", "serve it without 'del'"]),
    ],
)
def test_models(model, words, models, engine_config):
    assert engine_config(model).speculative_config is None, "vLLM itself serves this"
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        engine_config(model, speculative_config="del")
    assert_one_problem(error.value, words if model == "encoder" else [repr(models[model]), *words])


def test_encoder_decoder_model(engine_config):
    """The one at hand also takes audio, which is a second reason."""
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        engine_config("encoder_decoder", speculative_config="del")
    encoder_decoder, multimodal = problems(error.value)
    assert "WhisperForConditionalGeneration" in encoder_decoder
    assert "is an encoder-decoder: serve a decoder-only model" in encoder_decoder
    assert "multimodal" in multimodal


def test_all_problems_at_once(engine_config):
    with pytest.raises(ValueError, match="cannot serve this configuration") as error:
        engine_config(
            "hybrid",
            speculative_config="del",
            pipeline_parallel_size=2,
            enable_lora=True,
            kv_transfer_config=KV_CONNECTOR,
        )
    found = problems(error.value)
    assert len(found) == 4
    for word in ("recurrent", "pipeline_parallel_size=2", "enable_lora=True", "kv_transfer_config"):
        assert sum(word in problem for problem in found) == 1


class TestWhatACpuCannotBeAskedFor:
    """vLLM refuses these on a CPU before we see them; so a configuration that exists is changed."""

    @pytest.fixture
    def vllm_config(self, engine_config):
        return copy.deepcopy(engine_config(speculative_config="del"))

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("prefill_context_parallel_size", 2, ["prefill_context_parallel_size=2", "set it to 1"]),
            ("enable_eplb", True, ["enable_eplb=True", "set it to False"]),
            ("enable_dbo", True, ["enable_dbo", "turn it off"]),
            ("ubatch_size", 2, ["ubatch_size", "turn it off"]),
        ],
    )
    def test_parallel_settings(self, field, value, words, vllm_config):
        check_supported(vllm_config)
        setattr(vllm_config.parallel_config, field, value)
        with pytest.raises(ValueError, match="cannot serve this configuration") as error:
            check_supported(vllm_config)
        assert_one_problem(error.value, words)

    @pytest.mark.parametrize("objective", ["goodput", "tpl"])
    def test_experts_with_data_parallelism(self, objective, vllm_config, monkeypatch):
        monkeypatch.setattr(type(vllm_config.model_config), "is_moe", True)
        check_supported(vllm_config)
        vllm_config.parallel_config.data_parallel_size = 2
        vllm_config.speculative_config.del_objective = objective
        if objective == "tpl":
            check_supported(vllm_config)
            return
        with pytest.raises(ValueError, match="cannot serve this configuration") as error:
            check_supported(vllm_config)
        assert_one_problem(error.value, ["data_parallel_size=2", "LlamaForCausalLM", "set del_policy='fixed'"])

    def test_diffusion_model(self, vllm_config):
        vllm_config.model_config.is_diffusion = True
        with pytest.raises(ValueError, match="cannot serve this configuration") as error:
            check_supported(vllm_config)
        assert_one_problem(error.value, ["LlamaForCausalLM", "diffusion", "autoregressive"])

    def test_v1_runner_on_a_gpu(self, vllm_config, monkeypatch):
        vllm_config.device_config.device_type = "cuda"
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        with pytest.raises(ValueError, match="cannot serve this configuration") as error:
            check_supported(vllm_config)
        assert_one_problem(error.value, ["V1", "'cuda'", "Model Runner V2", "VLLM_USE_V2_MODEL_RUNNER"])

    def test_v2_runner_on_a_gpu_is_served(self, vllm_config, monkeypatch):
        vllm_config.device_config.device_type = "cuda"
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        check_supported(vllm_config)

    @pytest.mark.parametrize("runner", ["0", "1"])
    def test_either_runner_on_a_cpu_is_served(self, runner, vllm_config, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
        check_supported(vllm_config)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {}),
        ("llama", {"tensor_parallel_size": 2}),
        ("llama", {"data_parallel_size": 2}),
        ("llama", {"enable_prefix_caching": True}),
        ("llama", {"enable_prefix_caching": False}),
        ("llama", {"enable_chunked_prefill": False, "max_model_len": 128}),
        ("llama", {"max_num_seqs": 1}),
        ("llama", {"cpu_offload_gb": 1, "offload_backend": "uva"}),
        ("sliding_window", {}),
    ],
)
def test_served(model, settings, engine_config):
    assert isinstance(engine_config(model, speculative_config="del", **settings).speculative_config, DelConfig)


@pytest.mark.parametrize("settings", [{"enable_lora": True}, {"pipeline_parallel_size": 2}])
def test_other_methods_are_not_asked(settings, engine_config):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    assert not isinstance(engine_config(speculative_config=ngram, **settings).speculative_config, DelConfig)


@pytest.mark.parametrize("wish", [{"min_p": 0.1}, {"logit_bias": {3: 1.0}}])
def test_what_vllm_refuses_for_a_request(wish, del_config):
    """The README says so; with a vLLM that takes them, it has to be tested what `del` makes of them."""
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        SamplingParams(**wish)._validate_spec_decode(del_config())
