"""Every published chat template over conversations of all kinds: what transformers makes of it, or a typed error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support import shared_data

from hasten.checkpoint import chat
from hasten.errors import CheckpointError, InputError

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hi there\n"}
ANSWER = {"role": "assistant", "content": 'Hello <you> & "all" — 你好 😀'}
BYE = {"role": "user", "content": "Bye now"}
ASK = {"role": "user", "content": "How warm is Zürich?"}
THOUGHT = {"role": "assistant", "content": "<think>\nPolite.\n</think>\n\nHello", "reasoning_content": "Polite."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}},
        }
    ],
}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": '{"degrees": 21}'}
WARM = {"role": "assistant", "content": "21 degrees."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "days": {"type": "integer", "enum": [1, 3]},
                    "units": {"type": ["string", "null"]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "get_time", "description": "", "parameters": {"type": "object"}}},
]
PLAIN: list[dict[str, Any]] = copy.deepcopy(TOOLS[:1])  # some templates know single types alone
PLAIN[0]["function"]["parameters"]["properties"].pop("units")
NEEDS_MORE = {  # these render nothing without a variable of their own, or a tool's `return`
    "fireworks-ai-llama-3-firefunction-v2",
    "CohereForAI-c4ai-command-r-plus-tool_use",
}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([HELLO], None),
    "system": ([SYSTEM, HELLO], None),
    "several turns": ([SYSTEM, HELLO, ANSWER, BYE], None),
    "ends with an answer": ([HELLO, ANSWER], None),
    "tools": ([SYSTEM, ASK], TOOLS),
    "a call and its result": ([ASK, CALL, RESULT], TOOLS),
    "a call in the past": ([SYSTEM, ASK, CALL, RESULT, WARM, BYE], TOOLS),
    "two calls": ([ASK, {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT, RESULT], TOOLS),
    "thoughts": ([HELLO, THOUGHT, BYE], None),
    "no system, two users": ([HELLO, BYE], None),
    "a tool of plain types": ([SYSTEM, ASK], PLAIN),
    "nothing": ([], None),
    "empty texts": ([{"role": "user", "content": ""}], None),
    "only a system": ([SYSTEM], None),
    "a stray result": ([RESULT], TOOLS),
}


def published() -> list[Path]:
    folder = shared_data("tokenizers", "chat_templates")
    return sorted(folder.glob("*.jinja")) if folder else []


def rendered(template: str, values: dict[str, Any]) -> tuple[str, str]:
    """("text", the prompt) or (the kind of refusal, what it says)."""
    try:
        return "text", chat.render(template, values)
    except InputError as error:
        return "refused", error.message
    except CheckpointError as error:
        return "failed", error.message


def expected(template: str, values: dict[str, Any]) -> tuple[str, str]:
    """As transformers does it; its TemplateError is a template's own refusal, anything else a fault."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    values = dict(values)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("warnings.warn", lambda *_, **__: None)
            texts, _ = render_jinja_template([values.pop("messages")], chat_template=template, **values)
        return "text", texts[0]
    except jinja2.exceptions.UndefinedError as error:
        return "failed", str(error)
    except jinja2.TemplateError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", str(error)


@pytest.mark.skipif(not published(), reason="the shared data are not here (set HASTEN_SHARED_DATA)")
@pytest.mark.parametrize("path", published(), ids=lambda p: p.stem)
def test_as_transformers_renders_it_or_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = path.read_text(encoding="utf-8")
    try:
        import transformers.utils.chat_template_utils  # noqa: F401

        known = True
    except ImportError:
        known = False
    outcomes = []
    for name, (messages, tools) in CONVERSATIONS.items():
        for prompted in (True, False):
            values = {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": prompted,
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
            before = json.dumps(values)
            kind, text = rendered(template, copy.deepcopy(values))
            outcomes.append(kind)
            assert kind == "text" or text.startswith("the chat template"), (name, text)
            assert json.dumps(values) == before
            if known:
                kind_there, text_there = expected(template, copy.deepcopy(values))
                assert kind == kind_there or {kind, kind_there} == {"refused", "failed"}, (name, text, text_there)
                assert kind != "text" or text == text_there, name
    assert ("text" in outcomes) == (path.stem not in NEEDS_MORE)
