"""Tool calls and thoughts in a model's text, whole and however it is cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server.serving import Server, eventually, serve
from support import need_shared_data

from hasten import LLM
from hasten.engine.engine import Engine
from hasten.server.reasoning import Reasoning
from hasten.server.tools import Call, Family, ToolCalls, family

WEATHER = {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}
TIME = {"name": "get_time", "arguments": {}}


def as_text(call: dict[str, Any], arguments: str = "arguments") -> str:
    return json.dumps({"name": call["name"], arguments: call["arguments"]}, ensure_ascii=False)


CASES: list[tuple[Family, str, str, list[dict[str, Any]]]] = [
    ("hermes", f"<tool_call>\n{as_text(WEATHER)}\n</tool_call>", "", [WEATHER]),
    (
        "hermes",
        f"Let me look.\n<tool_call>{as_text(WEATHER)}</tool_call>\n<tool_call>\n{as_text(TIME)}</tool_call>",
        "Let me look.\n",
        [WEATHER, TIME],
    ),
    ("hermes", f"<tool_call>{as_text(TIME)}", "", [TIME]),  # the end came before the closing mark
    ("hermes", "<tool_call>no JSON</tool_call> then", "<tool_call>no JSON</tool_call> then", []),
    ("hermes", "a < b <tool", "a < b <tool", []),
    ("hermes", "<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, []),
    ("llama3", as_text(WEATHER, "parameters"), "", [WEATHER]),
    ("llama3", f"<|python_tag|>{as_text(WEATHER, 'parameters')}; {as_text(TIME, 'parameters')}", "", [WEATHER, TIME]),
    ("llama3", "It is warm {today}.", "It is warm {today}.", []),
    ("llama3", '{"temperature": 3}', '{"temperature": 3}', []),
    ("mistral", f"[TOOL_CALLS] [{as_text(WEATHER)}, {as_text(TIME)}]", "", [WEATHER, TIME]),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich", "days": 3}', "", [WEATHER]),
    (
        "mistral",
        '[TOOL_CALLS]get_time[ARGS]{}[TOOL_CALLS]get_weather{"city": "Zürich", "days": 3}',
        "",
        [TIME, WEATHER],
    ),
    ("mistral", "plain [TOOL", "plain [TOOL", []),
    ("mistral", "[TOOL_CALLS] nonsense", "[TOOL_CALLS] nonsense", []),
]


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize(("kind", "text", "content", "wanted"), CASES)
def test_tool_calls(kind: Family, text: str, content: str, wanted: list[dict[str, Any]], size: int) -> None:
    parser = ToolCalls(kind)
    found, calls = "", list[Call]()
    for piece in pieces(text, size):
        new, more = parser.push(piece)
        found, calls = found + new, calls + more
    new, more = parser.finish()
    calls += more
    assert found + new == content
    assert [{"name": c.name, "arguments": json.loads(c.arguments)} for c in calls] == wanted
    assert len({c.id for c in calls}) == len(calls) == parser.count
    assert kind != "mistral" or all(len(c.id) == 9 and c.id.isalnum() for c in calls)


TWO = f"{as_text(WEATHER)}</tool_call> so <tool_call>{as_text(TIME)}</tool_call> end"


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize(
    ("kind", "text", "content"),
    [
        ("hermes", f"Look <tool_call>{TWO}", "Look "),
        ("mistral", f"[TOOL_CALLS] [{as_text(WEATHER)}, {as_text(TIME)}]", ""),
        ("llama3", f"{as_text(WEATHER, 'parameters')}; {as_text(TIME, 'parameters')}", ""),
    ],
)
def test_where_one_call_may_be_it_is_the_first(kind: Family, text: str, content: str, size: int) -> None:
    parser = ToolCalls(kind, one=True)
    parts = [*map(parser.push, pieces(text, size)), parser.finish()]
    assert "".join(p[0] for p in parts) == content
    assert [json.loads(c.arguments) for p in parts for c in p[1]] == [WEATHER["arguments"]]
    assert parser.full


def test_text_before_a_call_is_not_held_back() -> None:
    parser = ToolCalls("hermes")
    assert parser.push("Hello <to") == ("Hello ", [])
    assert parser.push("day") == ("<today", [])


THOUGHTS = [
    (False, "<think>hm\nyes</think>\n\nIt is 4.", "hm\nyes", "It is 4."),
    (False, "\n<think>\nhm</think>4", "\nhm", "4"),
    (True, "hm</think>\n\n4", "hm", "4"),
    (True, "cut short", "cut short", ""),
    (False, "just an answer with </think> in it", "", "just an answer with </think> in it"),
    (False, "<thin", "", "<thin"),
    (False, "4 < 5", "", "4 < 5"),
    (True, "a </thin k", "a </thin k", ""),
]


@pytest.mark.parametrize("size", [1, 3, 10_000])
@pytest.mark.parametrize(("inside", "text", "thought", "answer"), THOUGHTS)
def test_thoughts(inside: bool, text: str, thought: str, answer: str, size: int) -> None:
    splitter = Reasoning(inside)
    parts = [*map(splitter.push, pieces(text, size)), splitter.finish()]
    assert ("".join(p[0] for p in parts), "".join(p[1] for p in parts)) == (thought, answer)


FAMILIES = {
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "ibm-granite-granite-4.0": "hermes",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "unsloth-mistral-Devstral-Small-2507": "mistral",
    "Qwen3-Coder": None,  # XML
    "GLM-4.6": None,
    "openai-gpt-oss-120b": None,
    "deepseek-ai-DeepSeek-V3.1": None,
    "google-gemma-2-2b-it": None,
    "microsoft-Phi-3.5-mini-instruct": None,
}


@pytest.mark.parametrize(("name", "kind"), FAMILIES.items())
def test_families_of_published_templates(name: str, kind: Family | None) -> None:
    template = (need_shared_data("tokenizers", "chat_templates") / f"{name}.jinja").read_text(encoding="utf-8")
    assert family(template) == kind


TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.city }}{% endfor %}\n{% endfor %}<think>"
)
SAID = f"I see</think>\n\nOne moment.\n<tool_call>\n{as_text(WEATHER)}\n</tool_call>"


def function(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHERS = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rom"]}}, "additionalProperties": False}
TOOLS: Any = [function("get_weather", WEATHERS)]


APPEND = Engine._append


def speaking(spoken: list[int], then_free: bool = False) -> Any:
    def says(self: Engine, sequence: Any, token: int) -> None:
        place = len(sequence.output)
        ends = place + 1 == len(spoken) and not then_free
        APPEND(self, sequence, token if then_free and place >= len(spoken) else spoken[place])
        if ends and sequence.finish_reason is None:
            sequence.finish_reason = "stop"
            self._finish(sequence)

    return says


class TestServed:
    """A model that says what we tell it to: what clients then see, through the whole server."""

    @pytest.fixture
    def server(self, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
        tokenizer = llm.tokenizer
        monkeypatch.setattr(type(tokenizer), "_templates", lambda self: {"default": TEMPLATE})
        spoken = list(tokenizer.encode(SAID))
        monkeypatch.setattr(Engine, "_append", speaking(spoken))
        with serve(llm) as running:
            yield running

    def test_a_call_and_a_thought(self, server: Server) -> None:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            messages: Any = [
                {"role": "user", "content": "?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city": "Bern"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "rain"},
            ]
            ask: Any = {"model": "demo", "messages": messages, "tools": TOOLS, "max_tokens": 200}
            (choice,) = client.chat.completions.create(**ask).choices
            assert choice.finish_reason == "tool_calls"
            assert choice.message.reasoning_content == "I see"
            assert choice.message.content == "One moment.\n"
            (call,) = choice.message.tool_calls
            assert (call.type, call.function.name) == ("function", "get_weather")
            assert json.loads(call.function.arguments) == WEATHER["arguments"]
            parts = [p.choices[0] for p in client.chat.completions.create(**ask, stream=True)]
        assert parts[0].delta.role == "assistant"
        assert parts[0].delta.reasoning_content.startswith("I")
        assert "".join(p.delta.content or "" for p in parts) == "One moment.\n"
        assert "".join(getattr(p.delta, "reasoning_content", None) or "" for p in parts) == "I see"
        (streamed,) = [c for p in parts for c in p.delta.tool_calls or []]
        assert (streamed.index, json.loads(streamed.function.arguments)) == (0, WEATHER["arguments"])
        assert parts[-1].finish_reason == "tool_calls"

    @pytest.mark.parametrize("stream", [False, True])
    def test_not_in_parallel_the_first_call_ends_the_answer(
        self, server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch, stream: bool
    ) -> None:
        ask = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "max_tokens": 300, "n": 2}
        spoken = llm.tokenizer.encode(f"</think><tool_call>{TWO}")
        monkeypatch.setattr(Engine, "_append", speaking(spoken))
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            made: Any = client.chat.completions.create(model="demo", parallel_tool_calls=False, stream=stream, **ask)
            if stream:
                choices = [p.choices[0] for p in made]
                calls = [(c.index, d) for c in choices for d in c.delta.tool_calls or []]
                reasons = [(c.index, c.finish_reason) for c in choices if c.finish_reason]
                assert not any(c.delta.content for c in choices)
            else:
                calls = [(c.index, d) for c in made.choices for d in c.message.tool_calls]
                reasons = [(c.index, c.finish_reason) for c in made.choices]
                assert made.usage.completion_tokens <= 2 * len(spoken)
        assert sorted(i for i, _ in calls) == [0, 1]
        assert all(json.loads(d.function.arguments) == WEATHER["arguments"] for _, d in calls)
        assert sorted(reasons) == [(0, "tool_calls"), (1, "tool_calls")]
        eventually(server.idle)

    @pytest.mark.parametrize("stream", [False, True])
    def test_structured_output_begins_after_the_thought(
        self, server: Server, llm: LLM, monkeypatch: pytest.MonkeyPatch, stream: bool
    ) -> None:
        """The prompt opens the thought; we write it, and the model what comes after."""
        monkeypatch.setattr(Engine, "_append", speaking(llm.tokenizer.encode("I {see}</think>"), then_free=True))
        schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3}
        format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        tool: Any = {"type": "function", "function": {"name": "get_weather"}}
        for bound in ({"response_format": format}, {"tools": TOOLS, "tool_choice": tool}):
            with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
                ask: Any = {"model": "demo", "messages": [{"role": "user", "content": "?"}], "seed": 1, **bound}
                made: Any = client.chat.completions.create(max_tokens=300, stream=stream, **ask)
                said = [p.choices[0].delta for p in made] if stream else [made.choices[0].message]
            assert "".join(getattr(d, "reasoning_content", None) or "" for d in said) == "I {see}"
            answer = "".join(d.content or "" for d in said)
            if "tools" in bound:
                assert answer == ""
                assert [c.function.name for d in said for c in d.tool_calls or []] == ["get_weather"]
            else:
                assert json.loads(answer) in [[*c] for n in (2, 3) for c in itertools.product("ab", repeat=n)]

    def test_without_tools_it_is_text(self, server: Server) -> None:
        ask = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 200}
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            choice = server.post("/v1/chat/completions", {**ask, **more}).json()["choices"][0]
            assert choice["message"]["content"] == SAID.partition("</think>")[2].lstrip("\n")
            assert choice["finish_reason"] == "stop"

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tools": [{"type": "function"}]}, "tools[0]"),
            ({"tools": [{"type": "web_search"}]}, "tools[0]"),
            ({"tools": TOOLS * 200}, "tools"),
            ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
            ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
            (
                {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
                "response_format",
            ),
            (
                {"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}},
                "structured_outputs",
            ),
            ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
            ({"tools": [*TOOLS, function("f", {"type": "array"})]}, "tools[1].function.parameters"),
            ({"tools": [*TOOLS, function("f", [])]}, "tools[1].function.parameters"),
            (
                {
                    "tools": [*TOOLS, function("f", {"type": "object", "properties": {"a": {"type": "king"}}})],
                    "tool_choice": "required",
                },
                "tools[1].function.parameters",
            ),
            (
                {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
                "messages[0].tool_calls[0]",
            ),
        ],
    )
    def test_wrong_tools(self, server: Server, fields: dict[str, Any], param: str) -> None:
        answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}], **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
