"""What a request may say about `del`, and what becomes of one that says it badly."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_del.wishes import longest_wished


@pytest.mark.parametrize(
    ("extra_args", "longest"),
    [
        (None, 8),
        ({}, 8),
        ({"other": 1}, 8),
        ({"del": {}}, 8),
        ({"del": {"enabled": True}}, 8),
        ({"del": {"enabled": False}}, 0),
        ({"del": {"max_draft": 3}}, 3),
        ({"del": {"max_draft": 0}}, 0),
        ({"del": {"max_draft": 100}}, 8),
        ({"del": {"enabled": False, "max_draft": 3}}, 0),
        ({"del": '{"max_draft": 3}'}, 3),
        ({"del": '{"enabled": false}'}, 0),
    ],
)
def test_wishes(extra_args: dict[str, Any] | None, longest: int) -> None:
    assert longest_wished(extra_args, 8) == longest


BAD = [
    ("off", r"'off' is no JSON"),
    (3, r"extra_args\['del'\] \(over HTTP: vllm_xargs\): 3 is not"),
    ("[1]", r"\[1\] is not understood"),
    ({"enable": False}, r" enable=False"),
    ({"enabled": 0}, r" enabled=0"),
    ({"max_draft": True}, r" max_draft=True"),
    ({"max_draft": -1}, r" max_draft=-1"),
    ({"max_draft": 2.0}, r" max_draft=2.0"),
    ({"max_draft": "3"}, r" max_draft='3'"),
    ({"max_draft": None}, r" max_draft=None"),
]


@pytest.mark.parametrize(("wish", "words"), BAD)
def test_a_bad_wish_names_its_field_and_value(wish: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        longest_wished({"del": wish}, 8)


def test_vllm_refuses_the_request_where_it_comes_in(del_config) -> None:
    """With the error that its server answers with 400; without `del` nobody reads it."""
    params = SamplingParams(extra_args={"del": {"max_draft": -1}})
    with pytest.raises(VLLMValidationError, match="max_draft"):
        params._validate_spec_decode(del_config())
    params._validate_spec_decode(None)
    SamplingParams(extra_args={"del": {"max_draft": 1}})._validate_spec_decode(del_config())
