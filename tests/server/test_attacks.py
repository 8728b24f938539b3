"""Attacks that servers of this kind have met, one test each: refused or harmless, while others are served as before."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest
from server.serving import MESSAGES, Server, completion, conversation, eventually, serve

from hasten import LLM
from hasten.checkpoint import chat
from hasten.server.protocol import ChatRequest, CompletionRequest

LONG = {"prompt": "def read", "max_tokens": 300, "ignore_eos": True, "seed": 5}


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serve(llm) as running:
        yield running
        eventually(running.idle)
        assert running.service.stats.faults == 0


@contextmanager
def neighbours(server: Server) -> Iterator[Counter[str]]:
    """Others ask all the while, by connections and threads of their own, and are answered as before: how often."""
    expected = server.post("/v1/completions", LONG).json()["choices"]
    answered: Counter[str] = Counter()
    stop = threading.Event()

    def complete(client: httpx.Client) -> None:
        assert client.post("/v1/completions", json=LONG).json()["choices"] == expected

    def look(client: httpx.Client) -> None:
        assert client.get("/health").status_code == 200
        stop.wait(0.02)

    def ask(once: Callable[[httpx.Client], None], name: str) -> None:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            while not stop.is_set():
                once(client)
                answered[name] += 1

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, complete, "completions"), pool.submit(ask, look, "health")]
        eventually(lambda: len(answered) == 2 or any(a.done() for a in asking), 600)
        before = answered.copy()
        try:
            yield answered
            eventually(lambda: all(answered[n] > before[n] for n in before) or any(a.done() for a in asking), 600)
        finally:
            stop.set()
            for each in asking:
                each.result()


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what is asked here")


@LINUX
def test_unbounded_n_and_best_of(server: Server) -> None:
    before = resident()
    for fields in ({"n": 17}, {"n": 10**9}, {"n": 2**63}, {"best_of": 10**9}, {"n": 16, "best_of": 10**9}):
        for ask in (completion, conversation):
            assert ask(server, **fields).status_code == 400, fields
    many = {"prompt": ["x"] * 128, "n": 16, "max_tokens": 400}  # each within its bound, the product beyond the queue
    assert server.post("/v1/completions", many).status_code == 400
    eventually(server.idle)
    assert resident() - before < 64 << 20


def test_empty_prompts(server: Server) -> None:
    for prompt in ("", [], [[]], [""], ["x", ""], [[1], []], None):
        assert completion(server, prompt=prompt).status_code == 400, prompt
    assert conversation(server, messages=[]).status_code == 400
    for content in ("", [], [{"type": "text", "text": ""}]):
        assert conversation(server, messages=[{"role": "user", "content": content}]).status_code in (200, 400)
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    eventually(server.idle)


@LINUX
def test_giant_bodies(server: Server) -> None:
    most = 1 << 20
    bodies = [
        b'{"prompt": [' + b"0," * (most // 2 - 20) + b"0]}",
        b'{"prompt": [' + b"[0]," * (most // 4 - 20) + b"[0]]}",
        b'{"messages": [' + b"{}," * (most // 3 - 20) + b"{}]}",
        b'{"stop": ' + b"[" * (most - 20),
        b'{"stop": ' + b'{"a":' * (most // 5 - 20),
        b'{"logit_bias": {' + b",".join(b'"%d":1' % i for i in range(80_000)) + b"}}",
        b'{"prompt": "' + b"a " * (most // 2 - 20) + b'"}',
        b'{"prompt": "' + "\U0001f600".encode() * (most // 4 - 20) + b'"}',
        b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["'
        + b"a" * (most - 200)
        + b'"]}}}}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * (most - 200) + b"}",
    ]
    before = resident()
    with neighbours(server):
        for body in bodies:
            for path in ("/v1/completions", "/v1/chat/completions", "/detokenize"):
                assert server.send(path, body).status_code == 400, (path, body[:60])
        assert server.send("/v1/completions", b'{"prompt": [' + b"0," * (4 << 20) + b"0]}").status_code == 413
        assert server.send("/v1/completions", b'{"prompt": [' + b"0," * ((4 << 20) - 20) + b"0]}").status_code == 400
    eventually(server.idle)
    assert resident() - before < 512 << 20


def test_prompts_that_cannot_fit_are_not_cut_into_tokens(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any) -> list[int]:
        raise AssertionError("this takes seconds of a thread")

    text = "word " * 200_000
    monkeypatch.setattr(type(server.app.state.context.config.served.tokenizer), "encode", encode)
    for answer, param in (
        (server.post("/v1/completions", {"prompt": text}), "prompt"),
        (conversation(server, messages=[{"role": "user", "content": text}]), "messages"),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert "the context of 512 tokens holds at most" in error["message"]


HOSTILE_REGEXES = [
    "(a+)+$",
    "(a|aa)+b",
    "((a{0,999}){0,999}){0,999}",
    r"\p{L}{1,100000}",
    "(.*a.{30})|(.*b.{31})",
    "(?:" * 2000 + "a" + ")" * 2000,
    "[" + "".join(chr(0x4E00 + 2 * i) for i in range(8000)) + "]{500}",
    "(?=a)(?!b)(a)\\1",
    "\x00",
    "a" * 70_000,
]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]} if depth < 20 else {"items": schema}
    return schema


HOSTILE_SCHEMAS: list[Any] = [
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$ref": "#/$defs/none"},
    {"$ref": "/etc/passwd"},
    {"$ref": "file:///etc/passwd"},
    {"$id": "file:///etc/", "$ref": "passwd"},
    nested(15),
    nested(400),
    {"type": "string", "pattern": "(a+)+$", "minLength": 10**9},
    {"type": "array", "items": {}, "minItems": 10**9},
    {"type": "string", "maxLength": 2**63},
    {"type": "integer", "multipleOf": 10**12, "minimum": -(10**300), "maximum": 10**300},
    {"type": "object", "properties": {str(i): {"type": "string"} for i in range(2000)}},
    {"type": "object", "patternProperties": {"(a+)+$": {}, "(b|bb)+": {}}, "required": [str(i) for i in range(500)]},
    {"enum": list(range(9000))},
    {"allOf": [{"pattern": f".*{i}.*"} for i in range(40)]},
    {"type": []},
    {"properties": 3},
    {"x" * 60_000: {}},
]


def test_bad_regexes_grammars_and_schemas(server: Server) -> None:
    """Each is compiled in a process of its own within two seconds of processor time, or refused by name."""
    wanted = [{"regex": regex} for regex in HOSTILE_REGEXES] + [{"json": schema} for schema in HOSTILE_SCHEMAS]
    wanted += [{"grammar": 'start: start start | "a" | '}, {"grammar": "start: A\nA: /(a+)+/ /(a+)+/"}]
    wanted += [{"grammar": "%import os\nstart: os"}, {"grammar": "start: " + "(" * 5000}]

    def ask(given: dict[str, Any]) -> tuple[dict[str, Any], httpx.Response]:
        return given, completion(server, structured_outputs=given, max_tokens=3)

    with neighbours(server), ThreadPoolExecutor(3) as pool:
        for given, answer in pool.map(ask, wanted):
            assert answer.status_code in (200, 400), (str(given)[:80], answer.text)
            if answer.status_code == 400:
                assert answer.json()["error"]["param"].startswith("structured_outputs."), answer.text
    eventually(server.idle)


def test_bad_patterns_of_tools(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ tools | tojson if tools }}<tool_call>{{ messages[0].content }}"
    monkeypatch.setattr(type(llm.tokenizer), "_templates", lambda _: {"default": template})
    with serve(llm, template=template) as running, neighbours(running):
        for pattern in HOSTILE_REGEXES[:5]:
            parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}
            tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
            for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
                status = conversation(running, tools=tools, tool_choice=choice).status_code
                assert status == 200 or (status == 400 and choice != "auto")
        eventually(lambda: running.service.active <= 1)


@pytest.fixture
def looping(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Its chat template counts as far as a client says."""
    template = "{% for i in range(count) %}{% for j in range(count) %}{% endfor %}{% endfor %}hello"
    monkeypatch.setattr(type(llm.tokenizer), "_templates", lambda _: {"default": template})
    monkeypatch.setattr(chat, "SECONDS", 1.0)
    with serve(llm, template=template) as running:
        yield running


def test_template_arguments_that_block_the_loop(looping: Server) -> None:
    assert conversation(looping, chat_template_kwargs={"count": 3}).status_code == 200
    with neighbours(looping) as answered:
        before = answered["health"]
        assert conversation(looping, chat_template_kwargs={"count": 99_999}).status_code == 400
        assert answered["health"] >= before + 5  # a second of it: the loop went on
        for count in (10**9, -1, 1e300, "9" * 256, True):
            answer = conversation(looping, chat_template_kwargs={"count": count})
            assert answer.status_code == 400 or count in (-1, True), (count, answer.text)
    for fields in ({"chat_template": "x"}, {"chat_template_kwargs": {"messages": []}}, {"documents": []}):
        assert conversation(looping, **fields).status_code == 400
    for name in ("self", "range", "raise_exception", "__class__", "loop", "", "count\n"):
        assert conversation(looping, chat_template_kwargs={name: 3}).status_code in (200, 400)
    assert conversation(looping, chat_template_kwargs={"count": [3]}).status_code == 400


NO_JSON = ["1e400", "-1e400", "NaN", "Infinity", "-Infinity", "0x10", "1_000", "01", ".5", "9" * 5000]
NO_NUMBER = ['"1"', "true", "false", "[1]", "{}", '""']
EXTREME = ["-1", "-0.0", "0.5", "5e-324", "1e308", "-1e308", str(2**31), str(2**63), str(-(2**63) - 1), str(2**64)]
EXTREME += [str(10**400), str(-(10**18)), "-9223372036854775809"]


def numeric(model: Any) -> list[str]:
    kinds = model.model_json_schema()["properties"]
    return [
        name
        for name, schema in kinds.items()
        if {"integer", "number"} & {kind.get("type") for kind in schema.get("anyOf", [schema])}
    ]


@pytest.mark.parametrize(
    ("path", "model"), [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)]
)
def test_negative_and_overflowing_numbers(server: Server, path: str, model: Any) -> None:
    names = numeric(model)
    assert {"temperature", "top_k", "n", "seed", "max_tokens", "priority", "prompt_logprobs"} <= set(names)
    start = {"prompt": "x"} if model is CompletionRequest else {"messages": MESSAGES}
    for name in names:
        fields = json.dumps({**start, **({} if name in ("max_tokens", "max_completion_tokens") else {"max_tokens": 2})})
        for value in (*NO_JSON, *NO_NUMBER, *EXTREME):
            answer = server.send(path, f'{fields[:-1]}, "{name}": {value}}}'.encode())
            strict = value not in EXTREME
            assert answer.status_code == 400 or (not strict and answer.status_code == 200), (name, value, answer.text)
            assert math.isfinite(answer.json().get("usage", {}).get("completion_tokens", 0))
    eventually(server.idle)


def test_numbers_inside_lists_and_objects(server: Server) -> None:
    for value in (*NO_JSON, '"1"', "true", "{}", '""', str(2**31), str(2**63), str(10**400), "-1", "0.5"):
        for field in (
            f'"prompt": [{value}]',
            f'"prompt": [[1], [{value}]]',
            f'"prompt": "x", "stop_token_ids": [{value}]',
            f'"prompt": "x", "allowed_token_ids": [{value}]',
            f'"prompt": "x", "logit_bias": {{"{value if value.isdigit() else 1}": {value}}}',
        ):
            if field == '"prompt": ["1"]':  # a list of texts
                continue
            status = server.send("/v1/completions", f'{{"max_tokens": 2, {field}}}'.encode()).status_code
            assert status == 400 or (status == 200 and value in ("-1", "0.5", str(2**31), str(2**63))), (field, status)
        assert server.send("/detokenize", f'{{"tokens": [{value}]}}'.encode()).status_code == 400
    eventually(server.idle)


def test_urls_that_a_client_names_are_not_fetched(server: Server) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.3)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.json"
        socket.create_connection(listener.getsockname()).close()
        listener.accept()[0].close()  # it would see one
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "file", "file": {"file_id": url, "file_data": url}},
            {"type": "image_url", "image_url": "file:///etc/passwd"},
        ):
            assert conversation(server, messages=[{"role": "user", "content": [part]}]).status_code == 400
        for schema in (
            {"$ref": url},
            {"$schema": url},
            {"$id": url, "$ref": "#/x"},
            {"$ref": f"{url}#/x"},
            {"$dynamicRef": url},
        ):
            format = {"type": "json_schema", "json_schema": {"schema": schema}}
            assert completion(server, response_format=format).status_code in (200, 400)
        assert completion(server, prompt=url).status_code == 200
        assert completion(server, structured_outputs={"grammar": f'%import "{url}"\nstart: x'}).status_code == 400
        for name in ("model", "user", "cache_salt"):
            assert completion(server, **{name: url}).status_code in (200, 404)
        with pytest.raises(TimeoutError):
            listener.accept()


@LINUX
def test_log_probabilities_of_a_whole_vocabulary(server: Server) -> None:
    before = resident()
    for count in (21, 4096, 10**9, -1):
        assert completion(server, logprobs=count).status_code == 400
        assert completion(server, prompt_logprobs=count).status_code == 400
        assert completion(server, logprobs=count, echo=True, max_tokens=0).status_code == 400
        assert conversation(server, logprobs=True, top_logprobs=count).status_code == 400
    most = completion(server, prompt=[[5] * 500] * 16, logprobs=20, echo=True, max_tokens=0)
    assert most.status_code == 200  # what may be asked for is bounded as well
    eventually(server.idle)
    assert resident() - before < 256 << 20


HOSTILE_TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{{ lipsum(99999, True, 90000, 99999) }}",
]


def test_chat_templates_that_attack(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    with serve(llm) as running, neighbours(running):
        for template in HOSTILE_TEMPLATES:
            with monkeypatch.context() as patched:
                patched.setattr(type(llm.tokenizer), "_templates", lambda _, text=template: {"default": text})
                answer = conversation(running)
            assert answer.status_code == 400, (template, answer.text)
            assert "the chat template" in answer.json()["error"]["message"]
