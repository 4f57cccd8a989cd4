"""DelConfig, built as vLLM builds it, through `EngineArgs`: its defaults, its forms, and what it refuses."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.models import LLAMA_LAYERS, LLAMA_TOKENS
from vllm_del.config import DEFAULT_NUM_SPECULATIVE_TOKENS, DelConfig, read_tokens

DEEPEST = LLAMA_LAYERS - 1


class TestDefaults:
    def test_fields(self, del_config):
        config = del_config()
        assert config.num_speculative_tokens == DEFAULT_NUM_SPECULATIVE_TOKENS == 6
        assert config.del_exit_layers == config.exits == [2, 4, 6]
        assert config.del_policy == "dynamic"
        assert config.del_objective == "goodput"
        assert config.del_shadow_budget == 0.02
        assert config.del_draft_vocab is None
        assert config.del_draft_head == "auto"

    @pytest.mark.parametrize(
        ("depth", "exits"),
        [(2, [1]), (3, [1]), (5, [2]), (8, [2, 4]), (16, [3, 5, 8]), (32, [4, 6, 11, 16]), (80, [10, 16, 27, 40])],
    )
    def test_auto_is_a_few_exits_in_the_first_half(self, depth, exits, engine_config):
        config = engine_config(speculative_config="del", hf_overrides={"num_hidden_layers": depth})
        assert config.speculative_config.exits == exits

    @pytest.mark.parametrize(
        ("depth", "exit_layer"), [(2, 1), (3, 1), (5, 2), (8, 4), (16, 4), (22, 4), (23, 5), (32, 6), (80, 16)]
    )
    def test_auto_and_fixed_is_a_fifth_of_the_depth_and_not_too_shallow(self, depth, exit_layer, engine_config):
        fixed = {"method": "del", "del_policy": "fixed"}
        config = engine_config(speculative_config=fixed, hf_overrides={"num_hidden_layers": depth})
        assert config.speculative_config.exits == [exit_layer]

    def test_the_target_is_told_which_hidden_states_to_hand_out(self, del_config):
        config = del_config(del_exit_layers=[4, 2])
        handed_out = config.target_model_config.hf_config.eagle_aux_hidden_state_layer_ids
        assert handed_out == [2, 4, LLAMA_LAYERS]

    def test_each_exit_has_compiled_code_of_its_own(self, del_config):
        hashes = {del_config(del_exit_layers=layers).compute_hash() for layers in (2, 3, "auto")}
        assert len(hashes) == 3
        assert del_config().compute_hash() == del_config(num_speculative_tokens=7).compute_hash()

    def test_auto_may_be_said(self, del_config):
        assert del_config(del_exit_layers="auto") == del_config()


class TestExitLayers:
    @pytest.mark.parametrize(
        ("given", "resolved"),
        [
            (4, [4]),
            ("4", [4]),
            ([4], [4]),
            ("2,4,8", [2, 4, 8]),
            ("2, 4, 8", [2, 4, 8]),
            ([2, 4, 8], [2, 4, 8]),
            ([8, 2], [8, 2]),
            ([2, 2, 4, 2], [2, 4]),
            (1, [1]),
            (DEEPEST, [DEEPEST]),
        ],
    )
    def test_accepted_forms(self, given, resolved, del_config):
        config = del_config(del_exit_layers=given)
        assert config.del_exit_layers == resolved
        assert config.exits == sorted(resolved)


RANGE = [f"from 1 to {DEEPEST}", "auto"]


class TestWrongValues:
    """Each is refused with the field, the value, and what is accepted."""

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (0, ["[0]", *RANGE]),
            (LLAMA_LAYERS, [f"[{LLAMA_LAYERS}]", *RANGE]),
            (-1, ["[-1]", *RANGE]),
            ([2, 0], ["[2, 0]", *RANGE]),
            ([2, LLAMA_LAYERS], [f"[2, {LLAMA_LAYERS}]", *RANGE]),
            ("3,-2", ["[3, -2]", *RANGE]),
            ([], ["[]", *RANGE]),
            ("", ["''", "auto", "4,8,12"]),
            ("deep", ["'deep'", "auto", "4,8,12"]),
            ("2,,3", ["'2,,3'", "auto", "4,8,12"]),
            ("2.5", ["'2.5'", "auto", "4,8,12"]),
            ("[2,3]", ["'[2,3]'", "auto", "4,8,12"]),
            ("AUTO", ["'AUTO'", "auto", "4,8,12"]),
            *(
                (value, [repr(value), "auto", "4,8,12"])
                for value in (True, 2.5, [2.5], ["deep"], [2, "3"], None, {"first": 2}, ["auto"])
            ),
        ],
    )
    def test_del_exit_layers(self, value, words, del_config):
        self.assert_refused(del_config, "del_exit_layers", value, words)

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("del_exit_layers", [True], ["[True]", "auto", "4,8,12"]),
            ("del_exit_layers", [2.0], ["[2.0]", "auto", "4,8,12"]),
            ("num_speculative_tokens", True, ["True", "from 1 to 64"]),
        ],
    )
    def test_lookalikes_of_an_integer(self, field, value, words, del_config):
        """`[true]` in JSON is a slip of the pen, and would quietly mean layer 1."""
        self.assert_refused(del_config, field, value, words)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (0, ["0", "from 1 to 64"]),
            (-3, ["-3", "from 1 to 64"]),
            (65, ["65", "from 1 to 64"]),
            (2.5, ["2.5", "from 1 to 64"]),
            ("many", ["many", "from 1 to 64"]),
            (None, ["None", "from 1 to 64"]),
            ([4], ["[4]", "from 1 to 64"]),
        ],
    )
    def test_num_speculative_tokens(self, value, words, del_config):
        self.assert_refused(del_config, "num_speculative_tokens", value, words)

    @pytest.mark.parametrize("value", ["x", "", None, "Fixed", 1])
    def test_del_policy(self, value, del_config):
        self.assert_refused(del_config, "del_policy", value, [repr(value), "'fixed'", "'dynamic'"])

    def test_several_depths_for_the_fixed_policy(self, del_config):
        with pytest.raises(ValueError, match=r"del_exit_layers=\[2, 3\].*fixed.*one depth"):
            del_config(del_policy="fixed", del_exit_layers=[2, 3])

    @pytest.mark.parametrize("value", ["x", None, "TPL", 1])
    def test_del_objective(self, value, del_config):
        self.assert_refused(del_config, "del_objective", value, [repr(value), "'goodput'", "'tpl'"])

    @pytest.mark.parametrize("value", [-0.1, 1.5, "much", None])
    def test_del_shadow_budget(self, value, del_config):
        self.assert_refused(del_config, "del_shadow_budget", value, [repr(value), "from 0 to 1"])

    @pytest.mark.parametrize("value", [True, 2.5, [5], {"size": 3}])
    def test_del_draft_vocab(self, value, del_config):
        self.assert_refused(del_config, "del_draft_vocab", value, [str(value), "a number of tokens, or a file"])

    @pytest.mark.parametrize("value", [0, -1, LLAMA_TOKENS, 10**9])
    def test_size_of_del_draft_vocab(self, value, del_config):
        self.assert_refused(del_config, "del_draft_vocab", value, [str(value), f"1 to {LLAMA_TOKENS - 1} tokens"])

    @pytest.mark.parametrize("value", ["x", None, "FP8", 8])
    def test_del_draft_head(self, value, del_config):
        self.assert_refused(del_config, "del_draft_head", value, [repr(value), "'auto'", "'model'", "'fp8'"])

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model", "org/draft"),
            ("quantization", "fp8"),
            ("draft_sample_method", "probabilistic"),
            ("prompt_lookup_max", 3),
            ("prompt_lookup_min", 1),
            ("draft_tensor_parallel_size", 1),
            ("tensor_parallel_size", 1),
            ("parallel_drafting", True),
            ("enforce_eager", True),
            ("max_model_len", 128),
            ("revision", "main"),
            ("attention_backend", "FLASH_ATTN"),
            ("rejection_sample_method", "block"),
            ("num_speculative_tokens_per_batch_size", [(1, 4, 2)]),
            ("disable_padded_drafter_batch", True),
            ("use_heterogeneous_vocab", True),
            ("enable_adaptive_verification", True),
            ("suffix_decoding_max_spec_factor", 2.0),
        ],
    )
    def test_fields_of_other_methods(self, field, value, del_config):
        words = ["'del'", "leave it out", "num_speculative_tokens", "del_exit_layers", "del_policy"]
        self.assert_refused(del_config, field, value, words)

    @pytest.mark.parametrize("field", ["del_exit_layer", "exit_layers", "num_spec_tokens"])
    def test_unknown_fields(self, field, del_config):
        words = ["num_speculative_tokens", "del_exit_layers", "del_policy"]
        self.assert_refused(del_config, field, 5, ["5", *words])

    def test_a_model_of_one_layer(self, engine_config):
        with pytest.raises(ValueError, match=r"'del' needs a model of at least 2 layers; this one has 1"):
            engine_config("one_layer", speculative_config="del")

    @staticmethod
    def assert_refused(del_config, field, value, words):
        with pytest.raises(ValidationError, match=field) as error:
            del_config(**{field: value})
        # Past this comes pydantic's own print of all arguments, which could hold any word.
        message = str(error.value).split("input_type=ArgsKwargs")[0].split("input_value=ArgsKwargs")[0]
        for word in [field, *words]:
            assert word in message


class TestDraftVocabulary:
    @pytest.mark.parametrize("given", [7, "7"])
    def test_a_number(self, given, del_config):
        assert del_config(del_draft_vocab=given).del_draft_vocab == 7

    @pytest.mark.parametrize(
        ("name", "write"),
        [
            ("ids.json", lambda file: file.write_text("[5, 3, 90]")),
            ("ids.pt", lambda file: torch.save([5, 3, 90], file)),
            ("ids.pt", lambda file: torch.save(torch.tensor([5, 3, 90]), file)),
        ],
    )
    def test_a_file(self, name, write, tmp_path, del_config):
        write(tmp_path / name)
        config = del_config(del_draft_vocab=str(tmp_path / name))
        assert read_tokens(config.del_draft_vocab, LLAMA_TOKENS) == [5, 3, 90]

    @pytest.mark.parametrize(
        ("name", "text", "words"),
        [
            ("none.json", None, "No such file"),
            ("none.pt", None, "No such file"),
            ("ids.json", "5 3", "neither JSON nor"),
            ("ids.pt", "[5]", "neither JSON nor"),
            ("ids.json", '{"ids": [5]}', "a list of token ids is needed"),
            ("ids.json", "[]", "a list of token ids is needed"),
            ("ids.json", "[true]", "a list of token ids is needed"),
            ("ids.json", f"[{LLAMA_TOKENS}]", f"token {LLAMA_TOKENS} is not in the model's vocabulary of"),
            ("ids.json", "[-1]", "token -1 is not in"),
            ("ids.json", "[5, 5, 5, 6]", "it has 2 tokens twice"),
        ],
    )
    def test_a_file_that_is_none(self, name, text, words, tmp_path, del_config):
        if text is not None:
            (tmp_path / name).write_text(text)
        file = str(tmp_path / name)
        with pytest.raises(ValueError, match="del_draft_vocab") as error:
            del_config(del_draft_vocab=file)
        assert f"del_draft_vocab={file!r}: " in str(error.value)
        assert words in str(error.value)

    def test_compiled_code_does_not_depend_on_it(self, del_config):
        hashes = {del_config(del_draft_vocab=size, del_draft_head="model").compute_hash() for size in (None, 7)}
        assert hashes == {del_config().compute_hash()}


EXITS = st.integers(1, DEEPEST)
EXIT_LAYERS = st.one_of(
    st.just("auto"),
    EXITS,
    EXITS.map(str),
    st.lists(EXITS, min_size=1, max_size=6),
    st.lists(EXITS, min_size=1, max_size=6).map(lambda exits: ",".join(map(str, exits))),
)
FIELDS = st.fixed_dictionaries(
    {}, optional={"num_speculative_tokens": st.integers(1, 64), "del_exit_layers": EXIT_LAYERS}
)


class TestAnyAcceptedConfig:
    @given(fields=FIELDS)
    @settings(max_examples=60, deadline=None)
    def test_exits_lie_inside_the_model(self, fields, del_config):
        config = del_config(**fields)
        assert config.del_exit_layers
        assert all(type(layer) is int and 1 <= layer < LLAMA_LAYERS for layer in config.del_exit_layers)
        assert len(set(config.del_exit_layers)) == len(config.del_exit_layers)

    @given(fields=FIELDS)
    @settings(max_examples=60, deadline=None)
    def test_parses_to_itself(self, fields, del_config):
        config = del_config(**fields)
        again = del_config(
            num_speculative_tokens=config.num_speculative_tokens,
            del_exit_layers=config.del_exit_layers,
            del_policy=config.del_policy,
        )
        assert again == config
        assert again.compute_hash() == config.compute_hash()
        assert repr(again) == repr(config)

    @given(fields=FIELDS)
    @settings(max_examples=30, deadline=None)
    def test_survives_copies_and_other_processes(self, fields, del_config):
        config = del_config(**fields)
        for copied in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
            assert type(copied) is DelConfig
            assert copied == config
            assert copied.compute_hash() == config.compute_hash()

    @given(fields=FIELDS)
    @settings(max_examples=30, deadline=None)
    def test_logs_say_del(self, fields, del_config):
        config = del_config(**fields)
        for text in (repr(config), str(config), f"{config}"):
            assert "method='del'" in text
            assert f"num_speculative_tokens={config.num_speculative_tokens}" in text
            assert f"del_exit_layers={config.del_exit_layers}" in text

    @given(layers=st.lists(st.integers(-3, LLAMA_LAYERS + 3), max_size=5))
    @settings(max_examples=60, deadline=None)
    def test_a_list_is_accepted_if_and_only_if_all_its_layers_are_inside(self, layers, del_config):
        if layers and all(1 <= layer < LLAMA_LAYERS for layer in layers):
            assert del_config(del_exit_layers=layers).del_exit_layers == list(dict.fromkeys(layers))
        else:
            with pytest.raises(ValueError, match="del_exit_layers"):
                del_config(del_exit_layers=layers)
