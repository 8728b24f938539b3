"""Bad input is a 400 that names its field, and never a 500: one case for each field, and for each known attack."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server.serving import MESSAGES, Server, completion, conversation, eventually, serve

from hasten import LLM
from hasten.server.config import HttpLimits


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    limits = HttpLimits(body=200_000, prompts=8, n=4, messages=50, tools=5)
    with serve(llm, limits=limits) as running:
        yield running
        eventually(running.idle)
        assert running.service.stats.faults == 0


def refused(answer: httpx.Response, param: str | None, words: str = "", status: int = 400) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert words in error["message"]
    assert param is None or param.split(".")[-1].split("[")[0] in error["message"] or words


BOTH = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e400}, None),  # Infinity is no JSON
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_k": 10**400}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"n": 10**12}, "n"),
    ({"n": -1}, "n"),
    ({"n": 1.5}, "n"),
    ({"best_of": 10**9}, "best_of"),
    ({"best_of": 2}, "best_of"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 5000}, "stop_token_ids"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"bad_words": "a"}, "bad_words"),
    ({"priority": 101}, "priority"),
    ({"priority": 10**30}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 1000}, "cache_salt"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    ({"suffix_": 1}, "suffix_"),
    ({"Temperature": 1}, "Temperature"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 10**9}, "prompt_logprobs"),
    ({"include_stop_str_in_output": 3}, "include_stop_str_in_output"),
    ({"allowed_token_ids": [4096]}, "allowed_token_ids"),
    ({"allowed_token_ids": [0], "min_tokens": 1}, "allowed_token_ids"),
    ({"allowed_token_ids": [0], "structured_outputs": {"regex": "ab"}}, "allowed_token_ids"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 1}, "min_tokens"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "king"}}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a{1000}{1000}{1000}"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
    ({"structured_outputs": {"pattern": "a"}}, "structured_outputs.pattern"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": {"type": "king"}}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["x" * 70_000]}}, "structured_outputs.choice"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
    ({"guided_regex": "(a+)+$"}, "guided_regex"),
    ({"model": 3}, "model"),
]


@pytest.mark.parametrize("ask", [completion, conversation])
@pytest.mark.parametrize(("fields", "param"), BOTH)
def test_wrong_values(server: Server, ask: Any, fields: dict[str, Any], param: str | None) -> None:
    if fields.get("temperature") == 1e400:
        body = json.dumps({"prompt": "x", "messages": MESSAGES, **fields})
        path = "/v1/completions" if ask is completion else "/v1/chat/completions"
        answer = server.send(path, body.encode())
        refused(answer, None, "Infinity is not a number that JSON has")
        return
    refused(ask(server, **fields), param)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": [[]]}, "prompt", "the prompt is empty"),
        ({"prompt": ["x"] * 9}, "prompt", "at most 8"),
        ({"prompt": [1, "x"]}, "prompt", "must be a text"),
        ({"prompt": [True]}, "prompt", "must be a text"),
        ({"prompt": {"a": 1}}, "prompt", "must be a text"),
        ({"prompt": [4096]}, "prompt", "token id 4096 is not in the vocabulary"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": [2**70]}, "prompt", "token id 11805"),
        ({"prompt": [1] * 512}, "prompt", "the context holds 512"),
        ({"prompt": "\ud800"}, None, "half of a surrogate pair"),
        ({"logprobs": 21}, "logprobs", "between 0 and 20"),
        ({"logprobs": -1}, "logprobs", "between 0 and 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not supported"),
        ({"messages": MESSAGES}, "messages", "unknown field"),
    ],
)
def test_wrong_completions(server: Server, fields: dict[str, Any], param: str | None, words: str) -> None:
    refused(completion(server, **fields), param, words)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "1 to 50"),
        ({"messages": MESSAGES * 51}, "messages", "1 to 50"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "Input should be"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight", "unknown field"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "must be a text or a list"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}
                ]
            },
            "messages[0].content",
            "'image_url': this model reads only text",
        ),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "only goes with logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "not supported"),
        ({"messages": [{"role": "user", "content": "x " * 600}]}, "messages", "the context holds 512"),
        ({"max_completion_tokens": 3}, "max_tokens", "differ"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", "1 or more"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "there are no tools"),
        ({"tool_choice": "always"}, "tool_choice", "must be 'none', 'auto', 'required' or"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "chat template knows none"),
        ({"functions": []}, "functions", "unknown field"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, "chat_template", "unknown field"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "nothing that this model's"),
        ({"chat_template_kwargs": {"x": {"y": [1] * 9}}}, "chat_template_kwargs.x", "nothing that this model's"),
        ({"prompt": "x"}, "prompt", "unknown field"),
    ],
)
def test_wrong_chats(server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    refused(conversation(server, **fields), param, words)


def test_nulls_are_as_nothing(server: Server) -> None:
    from hasten.server.protocol import ChatRequest, CompletionRequest

    for model, ask, needed in ((CompletionRequest, completion, {"prompt"}), (ChatRequest, conversation, {"messages"})):
        fields = dict.fromkeys(set(model.model_fields) - needed)
        assert ask(server, **fields).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"prompt": "x"',
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"a":' * 30_000,
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_none(server: Server, path: str, body: bytes) -> None:
    answer = server.send(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    if body in (b"[]", b"3", b"null", b'"x"'):
        assert answer.json()["error"]["message"] == "the body must be a JSON object"


def test_other_content_types_are_refused(server: Server) -> None:
    """What a page of another site can make a browser send must not start anything."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        refused(server.send("/v1/completions", b'{"prompt": "x"}', **{"content-type": kind}), "content-type")


def test_a_hundred_thousand_unknown_fields_cost_one_error(server: Server) -> None:
    started = time.monotonic()
    refused(server.post("/v1/completions", {f"f{i}": 0 for i in range(12_000)}), "f0", "unknown field")
    many = [{"role": "user", "content": "x", **{f"f{i}": 0 for i in range(12_000)}}]
    refused(conversation(server, messages=many), "messages[0].f0", "unknown field")
    refused(completion(server, stop_token_ids=["x"] * 30_000), "stop_token_ids[0]")
    refused(conversation(server, messages=[3] * 50_000), "messages[0]")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "fields",
    [{"model": "\ud800"}, {"\ud800": 1}, {"logit_bias": {"\udfff": 1}}, {"response_format": {"\udfff": 1}}],
)
def test_half_a_character_anywhere_is_refused(server: Server, fields: dict[str, Any]) -> None:
    refused(completion(server, **fields), None, "half of a surrogate pair")
    assert completion(server, prompt="\U0001f600").status_code == 200  # two halves make one


def test_no_such_route_or_method(server: Server) -> None:
    for method, path, status in (("GET", "/admin", 404), ("GET", "/v1/completions", 405), ("GET", "/../etc", 404)):
        answer = server.client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_value_of_any_field_is_a_500(server: Server, data: st.DataObject) -> None:
    from hasten.server.protocol import ChatRequest, CompletionRequest

    kind = data.draw(st.sampled_from([CompletionRequest, ChatRequest]))
    names = sorted(set(kind.model_fields) - {"stream", "max_tokens"})
    fields = {n: data.draw(json_values) for n in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))}
    answer = (completion if kind is CompletionRequest else conversation)(server, **fields)
    assert answer.status_code in (200, 400, 404), answer.text
