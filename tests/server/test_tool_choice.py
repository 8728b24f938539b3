"""Answers that must be tool calls: a small model writes valid ones, in the form of each family, because it must."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server.serving import Server, eventually, serve

from hasten import LLM
from hasten.engine.guidance import Guidance
from hasten.engine.request import StructuredOutputsParams
from hasten.server.tool_choice import Offer, grammar
from hasten.server.tools import Family, ToolCalls

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
TEMPLATES: dict[str, str] = {
    "hermes": "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}",
    "llama3": '{% if tools %}{{ tools | tojson }}ipython "parameters"{% endif %}',
    "mistral": "{% if tools %}{{ tools | tojson }}[TOOL_CALLS]{% endif %}",
    "args": "{% if tools %}{{ tools | tojson }}[TOOL_CALLS] [ARGS]{% endif %}",
}
REST = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SCHEMAS: dict[str, dict[str, Any] | None] = {
    "get": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Bern", "Z\u00fcrich"]}},
    },
    "get_time": {
        "properties": {"zone": {"$ref": "#/$defs/city"}},
        "required": ["zone"],
        "additionalProperties": False,
        "$defs": {"city": {"type": "string", "pattern": "^[A-Z]{3}$"}},
    },
    "now": None,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, **({"parameters": schema} if schema else {})}}
    for name, schema in SCHEMAS.items()
]
NAMED: Any = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module", params=TEMPLATES)
def server(llm: LLM, request: pytest.FixtureRequest) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(llm.tokenizer), "_templates", lambda self: {"default": TEMPLATES[request.param] + REST})
        with serve(llm) as running:
            yield running
            eventually(running.idle)
            assert running.service.stats.faults == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as made:
        yield made


def calls_of(client: openai.OpenAI, stream: bool, seed: int, **fields: Any) -> tuple[list[tuple[str, Any]], str, str]:
    """(name, arguments) of each call, text, why it ended."""
    made: Any = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "?"}],
        tools=TOOLS,
        seed=seed,
        max_tokens=300,
        stream=stream,
        **fields,
    )
    if stream:
        parts = [p.choices[0] for p in made]
        calls = [c for p in parts for c in p.delta.tool_calls or []]
        assert [c.index for c in calls] == list(range(len(calls)))
        text, reason = "".join(p.delta.content or "" for p in parts), parts[-1].finish_reason
    else:
        (choice,) = made.choices
        calls, text, reason = choice.message.tool_calls or [], choice.message.content or "", choice.finish_reason
    found = [(c.function.name, json.loads(c.function.arguments)) for c in calls]
    for name, arguments in found:
        jsonschema.validate(arguments, SCHEMAS[name] or {"type": "object", "maxProperties": 0})
    return found, text, reason


@pytest.mark.parametrize("stream", [False, True])
def test_required(client: openai.OpenAI, stream: bool) -> None:
    """So small a model may call for ever: it does not where its end, as soon as there may be one, is likelier."""
    for seed in range(3):
        calls, text, reason = calls_of(client, stream, seed, tool_choice="required", logit_bias={"0": 100})
        assert calls
        assert (text, reason) == ("", "tool_calls")
    several = calls_of(client, stream, 3, tool_choice="required")
    assert several[2] in ("tool_calls", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_required_but_not_in_parallel(client: openai.OpenAI, stream: bool) -> None:
    for seed in range(4):
        calls, text, reason = calls_of(client, stream, seed, tool_choice="required", parallel_tool_calls=False)
        assert (len(calls), text, reason) == (1, "", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_named(client: openai.OpenAI, stream: bool) -> None:
    """OpenAI ends such an answer with "stop"."""
    for seed in range(3):
        calls, text, reason = calls_of(client, stream, seed, tool_choice=NAMED)
        assert ([name for name, _ in calls], text, reason) == (["get_time"], "", "stop")


SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>")


class WithMarks:
    """The demo's tokenizer, where the marks of calls are special tokens in place of its last ordinary ones."""

    def __init__(self, llm: LLM) -> None:
        self._plain = llm.tokenizer
        document = json.loads(llm.tokenizer.definition())
        first = llm.model.graph.vocabulary - len(SPECIAL)
        vocabulary = {k: v for k, v in document["model"]["vocab"].items() if v < first}
        merges = document["model"]["merges"]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        document["model"]["merges"] = [
            m for m, p in zip(merges, pairs, strict=True) if "".join(p) in vocabulary and {*p} <= vocabulary.keys()
        ]
        document["model"]["vocab"] = vocabulary
        self.marks = {text: first + i for i, text in enumerate(SPECIAL)}
        fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        document["added_tokens"] += [{"id": i, "content": text, **fields} for text, i in self.marks.items()]
        self._definition = json.dumps(document)

    def definition(self) -> str:
        return self._definition

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [self.marks[text]] if text in self.marks else list(self._plain.encode(text, special))

    def is_silent(self, id: int, skip_special: bool) -> bool:
        return id in self.marks.values()

    def stream(self, skip_special: bool = True) -> Any:
        return self._plain.stream(skip_special)


FORMS = {
    "hermes": r'<tool_call>\n\{"name": "get_time", "arguments": \{.*\}\}\n</tool_call>',
    "mistral": r'\[TOOL_CALLS\] ?\[\{"name": "get_time", "arguments": \{.*\}\}\]',
    "args": r"\[TOOL_CALLS\]get_time\[ARGS\]\{.*\}",
}


@pytest.mark.parametrize("form", FORMS)
def test_marks_that_are_special_tokens_are_written_as_such(llm: LLM, form: str) -> None:
    tokenizer: Any = WithMarks(llm)
    family: Family = "hermes" if form == "hermes" else "mistral"
    offered = Offer(TOOLS, family, must=True, named="get_time", one=True)
    guidance = Guidance(tokenizer, llm.model.graph.vocabulary, llm.model.eos_token_ids)
    wanted = StructuredOutputsParams(grammar=grammar(offered, TEMPLATES[form], tokenizer))
    guide = guidance.compile(wanted).start()
    written, text = array("i"), ""
    names = {i: mark for mark, i in tokenizer.marks.items()}
    (eos,) = llm.model.eos_token_ids
    while len(written) < 200:  # the token with the longest text that may follow, and the end as soon as it may
        mask = guide.mask(written)
        allowed = [t for t in range(llm.model.graph.vocabulary) if int(mask[t // 32]) >> t % 32 & 1]
        assert allowed, guide.error
        if eos in allowed:
            break
        token = next((t for t in allowed if t in names), None)
        token = max(allowed, key=lambda t: (len(llm.tokenizer.decode([t])), t)) if token is None else token
        written.append(token)
        text += names.get(token) or llm.tokenizer.decode([token])
    assert re.fullmatch(FORMS[form], text, re.DOTALL)
    assert {names[t] for t in written if t in names} == {mark for mark in SPECIAL if mark in text}
    parser = ToolCalls(family)
    parts = [parser.push(text), parser.finish()]
    ((call,),) = [p[1] for p in parts if p[1]]
    jsonschema.validate(json.loads(call.arguments), SCHEMAS["get_time"])
