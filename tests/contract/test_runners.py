"""How vLLM's two model runners make and call a drafter: what our drafters count on."""

import inspect

from tests.contract import source
from tests.contract.places import PROPOSER, RUNNER_V1, RUNNER_V2, at, ours, parameters


def calls(runner: str, function: str) -> list[source.Call]:
    """Those that a runner makes of `function`."""
    found = [call for call in source.calls_in(at(runner)) if call.function == function]
    assert found, f"{runner} calls {function} no more"
    return found


class TestV2Runner:
    """How it makes its speculator, and what it calls on it."""

    def test_makes_its_speculator_by_the_name_we_patch(self):
        (call,) = calls(RUNNER_V2, "init_speculator")
        assert call.positional == ("self.vllm_config", "self.device", "self.req_states")
        assert not call.keywords

    def test_calls_what_our_speculator_has(self):
        for name in ("load_model", "set_attn", "init_cudagraph_manager", "capture", "propose"):
            for call in calls(RUNNER_V2, f"self.speculator.{name}"):
                method = getattr(ours("DelSpeculator"), name)
                assert (misfit := call.misfit(method, is_bound=True)) is None, misfit

    def test_takes_the_layers_to_hand_out_from_the_configuration(self):
        """As V1's does: from the draft model's, which is the target's."""
        module = "vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils"
        reads = inspect.getsource(at(f"{module}:get_eagle3_aux_layers_from_config"))
        assert 'getattr(hf_config, "eagle_aux_hidden_state_layer_ids", None)' in reads
        assert "draft_model_config.hf_config" in reads

    def test_order_of_what_propose_gets(self):
        (call,) = (call for call in calls(RUNNER_V2, "self.speculator.propose") if call.positional)
        assert call.positional[0] == "input_batch"
        assert call.positional[5:8] == ("num_sampled", "num_rejected", "self.req_states.last_sampled_tokens")
        mine = parameters(ours("DelSpeculator").propose)
        assert [mine[i] for i in (1, 6, 7, 8)] == ["input_batch", "num_sampled", "num_rejected", "last_sampled"]
        assert call.positional[4] == mine[5] == "aux_hidden_states"

    def test_what_propose_needs_comes_by_keyword(self):
        """A positional one would be lost in our `*_`, one of another name in our `**__`."""
        needed = {"num_speculative_tokens", "dp_sync_state", "dummy_run", "skip_attn_for_dummy_run", "is_profile"}
        assert needed <= {keyword for call in calls(RUNNER_V2, "self.speculator.propose") for keyword in call.keywords}
        assert needed <= set(parameters(ours("DelSpeculator").propose))

    def test_drops_what_was_drafted_beyond_the_scheduled_length(self):
        assert "draft_tokens[:, num_spec_tokens:] = -1" in inspect.getsource(at(RUNNER_V2))


class TestV1Runner:
    """How it makes its proposer, and what it calls on it; the CPU's runner inherits all that."""

    def test_is_what_the_cpu_runner_is(self):
        assert issubclass(at("vllm.v1.worker.cpu_model_runner:CPUModelRunner"), at(RUNNER_V1))

    def test_makes_its_proposer_by_the_class_we_patch(self):
        (call,) = calls(RUNNER_V1, "DraftModelProposer")
        assert not call.positional
        assert set(call.keywords) == {"vllm_config", "device", "runner"}
        assert at("vllm.v1.worker.gpu_model_runner:DraftModelProposer") is at(PROPOSER)

    def test_takes_the_layers_to_hand_out_from_the_configuration(self):
        reads = inspect.getsource(at(RUNNER_V1))
        assert 'getattr(hf_config, "eagle_aux_hidden_state_layer_ids", None)' in reads
        assert "self.speculative_config.draft_model_config.hf_config" in reads

    def test_takes_drafts_of_several_lengths(self):
        """As lists, which the n-gram proposer returns too."""
        assert "isinstance(self._draft_token_ids, list)" in inspect.getsource(at(RUNNER_V1))

    def test_makes_metadata_of_drafts_that_may_be_none(self):
        """Second of what `_prepare_inputs` gives, whose caller names it so; sampling and drafting take `None`."""
        prepares, runner = inspect.getsource(at(f"{RUNNER_V1}._prepare_inputs")), inspect.getsource(at(RUNNER_V1))
        given = "logits_indices, spec_decode_metadata,"
        assert given in " ".join(prepares.rsplit("return (", 1)[1].split())
        assert f"{given} max_num_sampled_tokens = ( self._prepare_inputs(" in " ".join(runner.split())
        for function in ("_sample", "propose_draft_token_ids"):
            assert "if spec_decode_metadata is None:" in inspect.getsource(at(f"{RUNNER_V1}.{function}"))

    def test_calls_what_our_proposer_has(self):
        names = "load_model initialize_attn_backend prepare_inputs_padded prepare_next_token_ids_padded dummy_run"
        for name in names.split():
            for call in calls(RUNNER_V1, f"self.drafter.{name}"):
                method = getattr(ours("DelProposer"), name)
                assert (misfit := call.misfit(method, is_bound=True)) is None, misfit

    def test_what_propose_gets(self):
        """The other drafters get other arguments."""
        (call,) = (call for call in calls(RUNNER_V1, "self.drafter.propose") if "target_token_ids" in call.keywords)
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
        for call in calls(RUNNER_V1, "self.drafter.prepare_next_token_ids_padded"):
            assert "self.discard_request_mask.gpu" in call.positional
