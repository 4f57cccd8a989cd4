"""Every way to ask for `del` means the same: each shell spelling, each Python spelling, a YAML file."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_del.config import DelConfig

PLAIN = {"method": "del"}
DETAILED = {"method": "del", "num_speculative_tokens": 6, "del_exit_layers": [2, 3]}

PLAIN_ARGUMENTS = [
    "--speculative-config del",
    "--speculative-config=del",
    "--speculative_config del",
    "-sc del",
    """--speculative-config {"method":"del"}""",
    "--speculative-config.method del",
    "-sc.method del",
    "--speculative-config.del_exit_layers auto",
    "--speculative-config.del_policy dynamic",
    "--spec-method del",
]
DETAILED_ARGUMENTS = [
    "--speculative-config del --spec-tokens 6 --speculative-config.del_exit_layers 2,3",
    """--speculative-config {"method":"del","num_speculative_tokens":6,"del_exit_layers":[2,3]}""",
    """--speculative-config {"num_speculative_tokens":6,"del_exit_layers":"2,3"}""",
    """--speculative-config {"method":"del","num-speculative-tokens":6,"del-exit-layers":[2,3]}""",
    "--speculative-config.method del --speculative-config.num_speculative_tokens 6 "
    "--speculative-config.del_exit_layers 2,3",
    "--speculative-config.num_speculative_tokens 6 --speculative-config.del_exit_layers 2,3",
    "--speculative-config.del-exit-layers 2,3 --spec-tokens 6",
    "-sc.del_exit_layers 2,3 -sc.num_speculative_tokens 6",
    "--spec-method del --spec-tokens 6 --speculative-config.del_exit_layers 2,3",
    """--spec-tokens 6 --speculative-config {"method":"del","del_exit_layers":[2,3]}""",
    """--spec-method del --speculative-config {"num_speculative_tokens":6,"del_exit_layers":"2,3"}""",
]


def parse(arguments: list[str], args_class: type[EngineArgs] = AsyncEngineArgs) -> EngineArgs:
    """What vLLM's own command line makes of `arguments`; `AsyncEngineArgs` is what `vllm serve` uses."""
    parser = args_class.add_cli_args(FlexibleArgumentParser())
    return args_class.from_cli_args(parser.parse_args(arguments))


def del_config(args: EngineArgs) -> DelConfig:
    config = args.create_engine_config().speculative_config
    assert isinstance(config, DelConfig)
    return config


@pytest.fixture
def command_line(models: dict[str, str]) -> list[str]:
    return ["--model", models["llama"], "--skip-tokenizer-init", "--enforce-eager"]


@pytest.mark.parametrize("args_class", [EngineArgs, AsyncEngineArgs])
@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        *((line, PLAIN) for line in PLAIN_ARGUMENTS),
        *((line, DETAILED) for line in DETAILED_ARGUMENTS),
        ("--spec-method del --speculative-config.del_draft_vocab 64", {"method": "del", "del_draft_vocab": 64}),
    ],
)
def test_command_line(arguments, fields, args_class, command_line, engine_args):
    parsed = parse(command_line + arguments.split(), args_class)
    assert del_config(parsed) == del_config(engine_args(speculative_config=fields))


@pytest.mark.parametrize("given", ["del", {"method": "del"}, {"del_exit_layers": "auto"}])
def test_python(given, engine_args):
    assert del_config(engine_args(speculative_config=given)) == del_config(engine_args(speculative_config=PLAIN))


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"spec_method": "del", "spec_tokens": 6, "speculative_config": {"del_exit_layers": [2, 3]}}, DETAILED),
        ({"spec_tokens": 6, "speculative_config": {"del_exit_layers": "2,3"}}, DETAILED),
        ({"spec_tokens": 6, "speculative_config": "del"}, {"method": "del", "num_speculative_tokens": 6}),
        ({"spec_method": "del", "spec_tokens": 6}, {"method": "del", "num_speculative_tokens": 6}),
    ],
)
def test_python_aliases(settings, fields, engine_args):
    assert del_config(engine_args(**settings)) == del_config(engine_args(speculative_config=fields))


@pytest.mark.parametrize(
    "given", [{"speculative_config": "del"}, {"speculative_config": PLAIN}, {"spec_method": "del"}]
)
def test_llm(given, models, engine_args, monkeypatch):
    """`LLM(...)` up to where the engine would start."""

    class Reached(Exception):
        pass

    def stop(engine_args: EngineArgs, **_: Any) -> None:
        raise Reached(engine_args)

    monkeypatch.setattr(LLMEngine, "from_engine_args", stop)
    with pytest.raises(Reached) as reached:
        LLM(models["llama"], skip_tokenizer_init=True, enforce_eager=True, **given)
    assert del_config(reached.value.args[0]) == del_config(engine_args(speculative_config=PLAIN))


@pytest.mark.parametrize(("value", "fields"), [("del", PLAIN), (DETAILED, DETAILED)])
def test_yaml_file(value, fields, tmp_path: Path, command_line, engine_args):
    file = tmp_path / "config.yaml"
    file.write_text(f"speculative-config: {json.dumps(value)}\n")
    parsed = parse([*command_line, "--config", str(file)])
    assert del_config(parsed) == del_config(engine_args(speculative_config=fields))


def test_the_same_arguments_may_be_used_twice(engine_args):
    """`EngineArgs` outlives its configuration: what is made from it must not spoil it."""
    args = engine_args(spec_method="del", speculative_config={"del_exit_layers": "2,3"})
    assert del_config(args) == del_config(args)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spec_model": "org/draft", "spec_method": "del"}, ["--spec-model", "org/draft", "leave it out"]),
        ({"spec_method": "del", "speculative_config": "del"}, ["--spec-method", "method", "mutually exclusive"]),
        (
            {"spec_tokens": 3, "speculative_config": {"method": "del", "num_speculative_tokens": 4}},
            ["--spec-tokens", "num_speculative_tokens", "mutually exclusive"],
        ),
        ({"spec_method": "ngram", "speculative_config": "del"}, ["--spec-method", "method", "mutually exclusive"]),
        ({"speculative_config": "DEL"}, ["speculative_config='DEL'", "give 'del', or a dict"]),
        ({"speculative_config": ["del"]}, [r"speculative_config=\['del'\]", "give 'del', or a dict"]),
        (
            {"speculative_config": {"method": "del", "draft_model_config": "org/draft"}},
            ["draft_model_config='org/draft'", "leave it out"],
        ),
    ],
)
def test_contradictions_and_what_is_not_understood_are_refused(settings, words, engine_config):
    with pytest.raises(ValueError, match=words[0]) as error:
        engine_config(**settings)
    for word in words[1:]:
        assert word in str(error.value)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_fields_of_del_do_not_turn_another_method_into_it(method, engine_config):
    """vLLM's own config class refuses them, as it refuses any field it does not know."""
    with pytest.raises(ValueError, match="del_exit_layers") as error:
        engine_config(speculative_config={"method": method, "num_speculative_tokens": 2, "del_exit_layers": [2]})
    assert "for SpeculativeConfig" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "speculative_config", "spec_method"),
    [
        ([], None, None),
        (["--speculative-config", "None"], None, None),
        (["--speculative-config", '{"method": "ngram", "prompt_lookup_max": 3}'], {"method": "ngram"}, None),
        (["--speculative-config.method", "ngram"], {"method": "ngram"}, None),
        (["--spec-method", "ngram"], None, "ngram"),
    ],
)
def test_other_arguments_parse_as_before(arguments, speculative_config, spec_method, command_line):
    parsed = parse(command_line + arguments)
    if speculative_config is None:
        assert parsed.speculative_config is None
    else:
        assert parsed.speculative_config.items() >= speculative_config.items()
    assert parsed.spec_method == spec_method


@pytest.mark.parametrize(
    ("option", "value"), [("--speculative-config", "delx"), ("--speculative-config", "{"), ("--spec-method", "delx")]
)
def test_nonsense_is_still_refused(option, value, command_line, capsys):
    with pytest.raises(SystemExit):
        parse([*command_line, option, value])
    message = capsys.readouterr().err
    assert f"argument {option}" in message
    assert value in message
