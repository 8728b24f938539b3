"""What the demo model writes under schemas, regexes, grammars and choices, read back by other libraries."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hasten import LLM, SamplingParams
from hasten.backends import native
from hasten.engine import guidance
from hasten.engine.engine import Engine
from hasten.engine.guidance import Guidance, Thought
from hasten.engine.request import CompletionOutput, StructuredOutputsParams
from hasten.errors import DependencyError, InputError

pytest.importorskip("llguidance")
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", context=512, max_batch=4, threads=1)


def how(seed: int = 0, temperature: float = 1.0, max_tokens: int = 400, **wanted: Any) -> SamplingParams:
    return SamplingParams(
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
        structured_outputs=StructuredOutputsParams(**wanted),
    )


def outputs(llm: LLM, **wanted: Any) -> list[CompletionOutput]:
    """The likeliest, and some that were drawn, together."""
    several = [how(temperature=0, **wanted), *(how(seed, **wanted) for seed in range(5))]
    found = [o.outputs[0] for o in llm.generate([PROMPT] * len(several), several)]
    assert not llm.engine.busy
    return found


SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -3, "maximum": 120},
    {"enum": ["red", "blue", 5, None, {"a": [1, True]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"anyOf": [{"const": "cat"}, {"const": "dog"}]},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,8}$"}, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"enum": [1, 2]}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {
            "left": {"$ref": "#/$defs/tree"},
            "right": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        },
        "required": ["left", "right"],
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: next(iter(s)) + str(len(str(s))))
@pytest.mark.parametrize("as_text", [False, True])
def test_a_schema_accepts_what_is_written(llm: LLM, schema: dict[str, Any], as_text: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for output in outputs(llm, json=json.dumps(schema) if as_text else schema):
        assert output.finish_reason == "stop"
        assert output.token_ids[-1] in llm.engine.eos_token_ids
        jsonschema.validate(json.loads(output.text), schema)


@pytest.mark.parametrize(
    "regex", ["[ab]{3}", r"\d{3}-\d{2}", "(foo|barbaz)+!", "[^x\n]{1,20}", "é{2}中?", r"(\w+ ){2}\w{1,9}\."]
)
def test_a_regex_matches_all_of_what_is_written(llm: LLM, regex: str) -> None:
    found = [o for o in outputs(llm, regex=regex) if o.finish_reason == "stop"]
    assert len(found) >= 3
    for output in found:
        assert re.fullmatch(regex, output.text)


def test_one_of_the_choices_is_written(llm: LLM) -> None:
    choices = [
        "yes",
        "yes, of course",
        'say "no"',
        "back\\slash",
        "line\nbreak",
        "é 中 \U0001f600",
        "{}|/[a]*",
        " x",
        "%",
    ]
    found = {o.text for seed in range(4) for o in outputs(llm, choice=choices[seed:])}
    assert found <= set(choices)
    assert len(found) > 2
    for choice in choices:
        assert {o.text for o in outputs(llm, choice=[choice])} == {choice}


def test_thousands_of_choices(llm: LLM) -> None:
    choices = [f"number {n}" for n in range(3000)]
    assert {o.text for o in outputs(llm, choice=choices)} <= set(choices)


def test_an_output_that_the_library_gives_up_says_so(llm: LLM) -> None:
    for output in outputs(llm, regex="(.*[a-m ].{90}){2}"):  # its states multiply with every character
        assert output.finish_reason == "abort"
        assert "structured output was given up: lexer error: too many states" in str(output.stop_reason)


def test_a_grammar_makes_what_is_written(llm: LLM) -> None:
    grammar = 'start: sum\nsum: term ("+" term)~1..3\nterm: /[1-9]/ | "(" sum ")"\n'
    for output in outputs(llm, grammar=grammar):
        if output.finish_reason == "stop":
            assert re.fullmatch(r"[0-9+()]+", output.text)
            assert eval(output.text) >= 2


def test_a_json_object_is_written(llm: LLM) -> None:
    found = [o for o in outputs(llm, json_object=True) if o.finish_reason == "stop"]
    assert found
    assert all(isinstance(json.loads(o.text), dict) for o in found)


def test_choices_of_one_request_go_their_own_ways(llm: LLM) -> None:
    several = replace(how(3, regex="[a-z]{10}"), n=4)
    texts = [o.text for o in llm.generate(PROMPT, several)[0].outputs]
    assert all(re.fullmatch("[a-z]{10}", t) for t in texts)
    assert len(set(texts)) == 4


def test_guided_outputs_do_not_depend_on_company_or_preemption(llm: LLM) -> None:
    wanted = [
        how(1, json=SCHEMAS[3]),
        how(2, regex="([a-z]+ ){12}"),
        how(3, choice=["one", "two"]),
        SamplingParams(seed=4, max_tokens=60, ignore_eos=True),
    ]
    prompts = [llm.tokenizer.encode(PROMPT + " there was" * i) for i in range(4)]
    alone = [llm.generate([p], w)[0].outputs[0].token_ids for p, w in zip(prompts, wanted, strict=True)]
    limits = replace(llm.program.limits, kv_blocks=4, block_size=32, context=128)
    program = native.compile(llm.model.graph, llm.model.weights(), limits)
    tight = Engine(program, llm.model.graph.vocabulary, llm.tokenizer, llm.model.eos_token_ids)
    started = [tight.add(p, w)[0] for p, w in zip(prompts, wanted, strict=True)]
    while tight.busy:
        tight.step()
    assert sum(s.preemptions for s in started) >= 1
    assert [s.output.tolist() for s in started] == alone


def test_other_constraints_hold_too(llm: LLM) -> None:
    e = llm.tokenizer.encode("e", special=False)
    params = replace(how(1, regex="[a-z ]{20}"), bad_words=["e"], logit_bias={e[-1]: 20})
    assert re.fullmatch("[a-z ]{20}", llm.generate(PROMPT, params)[0].outputs[0].text)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"regex": "[ab"}, "structured_outputs.regex is not valid: .*unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "nope"}}, "structured_outputs.json is not valid: Invalid type: nope"),
        ({"json": {"$ref": "#/$defs/x"}}, "structured_outputs.json is not valid"),
        ({"json": {"$ref": "http://127.0.0.1:9/x"}}, "structured_outputs.json is not valid"),
        ({"json": "{"}, "structured_outputs.json is not valid"),
        ({"json": {"a": {1, 2}}}, "structured_outputs.json is not valid"),
        ({"json": {"a": float("nan")}}, "structured_outputs.json is not valid"),
        ({"json": '{"items":' * 4000 + "{}" + "}" * 4000}, "structured_outputs.json is not valid"),
        ({"grammar": "start: foo"}, "structured_outputs.grammar is not valid: .*unknown name"),
        ({"grammar": "start: " + "(" * 9000}, "structured_outputs.grammar is not valid"),
        ({"choice": ["\ud800"]}, "structured_outputs.choice is not valid|takes more"),
        ({"regex": "\ud800"}, "structured_outputs.regex is not valid: half of a surrogate pair"),
        ({"regex": "a" * 65537}, "structured_outputs.regex has 65537 characters, must have 65536 or less"),
        ({"choice": ["ab"] * 20000}, "structured_outputs.choice has .* characters"),
        ({"json": {"type": "integer", "multipleOf": 999983}}, "takes more than 2 s or 1 GiB to compile"),
        (
            {"grammar": "start: A\nA: /(.*a.{20})/ & ~/(.*b.{21})/ & /(.*c.{19})/"},
            "takes more than 2 s or 1 GiB to compile",
        ),
    ],
    ids=lambda v: str(v)[:40].encode("unicode_escape").decode(),
)
def test_what_cannot_be_compiled_is_refused(llm: LLM, wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        llm.generate([PROMPT], how(**wanted))
    assert len(error.value.message) < 400
    assert not llm.engine.busy


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "structured_outputs has nothing, must have one of json, regex, choice, grammar, json_object"),
        ({"json": {}, "regex": "a"}, "structured_outputs has json and regex, must have one of"),
        ({"json": 5}, "structured_outputs.json is 5, must be a JSON schema"),
        ({"regex": ""}, "structured_outputs.regex is , must be a text that is not empty"),
        ({"choice": "ab"}, "structured_outputs.choice is ab, must be a list"),
        ({"choice": []}, "structured_outputs.choice is"),
        ({"choice": ["a", ""]}, "structured_outputs.choice is"),
        ({"json_object": "yes"}, "structured_outputs.json_object is yes, must be true or false"),
    ],
)
def test_what_is_no_structure(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        StructuredOutputsParams(**given)
    assert message in error.value.message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ignore_eos": True}, "ignore_eos is True, must be false with structured_outputs"),
        ({"min_tokens": 3}, "min_tokens is 3, must be 0 with structured_outputs"),
    ],
)
def test_parameters_that_contradict_it(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(structured_outputs=StructuredOutputsParams(json={}), **given)
    with pytest.raises(InputError, match="structured_outputs is a, must be StructuredOutputsParams"):
        SamplingParams(structured_outputs="a")  # type: ignore[arg-type]


def test_models_that_cannot_be_guided(llm: LLM) -> None:
    wanted = StructuredOutputsParams(regex="a")
    with pytest.raises(InputError, match="names none"):
        Guidance(llm.tokenizer, 4096, []).compile(wanted)
    with pytest.raises(InputError, match="need a tokenizer"):
        Guidance(None, 4096, [0]).compile(wanted)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DependencyError, match="llguidance is not installed") as error:
        llm.engine.guidance.compile(StructuredOutputsParams(regex="a"))
    assert error.value.hint == "pip install 'hasten[serve]'"


def test_what_is_known_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    known = Guidance(llm.tokenizer, llm.engine.vocabulary, llm.engine.eos_token_ids)
    tried: list[str] = []
    monkeypatch.setattr(guidance, "_try", lambda kind, task: tried.append(kind))
    monkeypatch.setattr(guidance, "KNOWN", 2)
    for wanted in (
        {"regex": "abc"},
        {"regex": "abc"},
        {"choice": ["abc"]},
        {"regex": "abc"},
        {"grammar": 'start: "a"'},
    ):
        known.compile(StructuredOutputsParams(**wanted))
    assert tried == ["regex", "choice", "grammar"]
    known.compile(StructuredOutputsParams(choice=["abc"]))
    assert tried[3:] == ["choice"], "the one that was not used for longest is forgotten"


def test_when_an_output_is_given_up_hangs_on_itself_alone(llm: LLM) -> None:
    """Each writes some thousand states of the lexer, so that together they would pass its limit."""
    greedy: Any = {"regex": "(.*a.{20}|.*b.{20}c.*){3}"}
    prompt = "Once upon a time"
    first = [llm.generate(prompt, replace(how(seed, **greedy), max_tokens=200))[0].outputs[0] for seed in range(4)]
    again = [llm.generate(prompt, replace(how(seed, **greedy), max_tokens=200))[0].outputs[0] for seed in (3, 2, 1, 0)]
    assert first == again[::-1]
    assert any(o.finish_reason == "length" for o in first)
    (two,) = llm.generate(prompt, replace(how(0, **greedy), max_tokens=200, n=4))
    assert two.outputs[0] == first[0]


def test_a_trial_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    def late(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("trial", 60)

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(InputError, match="takes more than"):
        llm.engine.guidance.compile(StructuredOutputsParams(regex="never seen"))


def test_several_threads_compile(llm: LLM) -> None:
    fresh = Guidance(llm.tokenizer, llm.engine.vocabulary, llm.engine.eos_token_ids)
    wanted = [StructuredOutputsParams(regex=f"[ab]{{{n}}}") for n in (1, 2, 3, 1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        grammars = list(pool.map(fresh.compile, wanted))
    a = llm.tokenizer.encode("a", special=False)[-1]
    for grammar, length in zip(grammars, (1, 2, 3, 1, 2, 3), strict=True):
        guide, output = grammar.start(), np.zeros(0, np.int32).tolist()
        for _ in range(length):
            assert not guide.mask(_array(output))[0] & 1  # 0 ends the output
            output.append(a)
        assert guide.mask(_array(output))[0] == 1
        assert guide.error == ""


def behind(llm: LLM, thought: Thought, params: SamplingParams) -> CompletionOutput:
    """One output whose answer is bound, and its thought is not."""
    assert params.structured_outputs
    grammar = llm.engine.guidance.compile(params.structured_outputs, thought)
    (choice,) = llm.engine.add(llm.tokenizer.encode(PROMPT), params, grammar=grammar)
    while llm.engine.busy:
        llm.engine.step()
    return llm._completion(0, choice)


@pytest.mark.parametrize("close", [".", " the"])
def test_what_is_thought_before_is_free(llm: LLM, close: str) -> None:
    found = [behind(llm, Thought("<", close, opened=True), how(seed, regex="[ab]{5}")) for seed in range(12)]
    whole = [o.text.partition(close) for o in found if o.finish_reason == "stop"]
    assert len(whole) >= 4
    assert all(re.fullmatch("[ab]{5}", rest.lstrip("\n")) for _, _, rest in whole)
    assert sum(len(thought) > 5 and not re.fullmatch("[ab]*", thought) for thought, _, _ in whole) >= 4
    given_up = {o.stop_reason for o in found if o.finish_reason == "abort"}
    assert all("structured output was given up" in str(reason) for reason in given_up)


def test_a_model_may_open_the_thought_itself(llm: LLM) -> None:
    (mark,) = llm.tokenizer.encode("(", special=False)
    thought = Thought("(", ")", opened=False)
    for bias, opens in ((100, True), (-100, False)):
        for seed in range(4):
            output = behind(llm, thought, replace(how(seed, regex="[ab]{5}"), logit_bias={mark: bias * 0.2}))
            assert (output.token_ids[0] == mark) == opens
            answer = output.text.partition(")")[2].lstrip("\n") if opens else output.text
            assert output.finish_reason != "stop" or re.fullmatch("[ab]{5}", answer)
            assert opens or output.finish_reason == "stop"
    unknown = Thought("<no token of its own>", ")", opened=False)
    assert re.fullmatch("[ab]{5}", behind(llm, unknown, how(1, regex="[ab]{5}")).text)


def test_a_thought_does_not_end_the_output(llm: LLM) -> None:
    eos = next(iter(llm.engine.eos_token_ids))
    params = replace(how(1, regex="[ab]{5}", max_tokens=12), logit_bias={eos: 100})
    output = behind(llm, Thought("<", "never written", opened=True), params)
    assert (len(output.token_ids), output.finish_reason) == (12, "length")
    assert eos not in output.token_ids


def test_a_token_may_end_the_thought_and_begin_the_answer(llm: LLM) -> None:
    grammar = llm.engine.guidance.compile(StructuredOutputsParams(regex="return[ab]"), Thought("<", "\n    ", True))
    joined = llm.tokenizer.encode("\n    return", special=False)
    a = llm.tokenizer.encode("a", special=False)[-1]
    for cut in range(len(joined)):  # step by step, and after a preemption all that was drawn at once
        guide = grammar.start()
        guide.mask(_array(joined[:cut]))
        mask = guide.mask(_array(joined))
        assert int(mask[a // 32]) >> a % 32 & 1
        assert not int(mask[joined[-1] // 32]) >> joined[-1] % 32 & 1
    wrong = grammar.start()
    wrong.mask(_array(llm.tokenizer.encode("\n    self", special=False)))
    assert "given up" in wrong.error


def test_thoughts_do_not_depend_on_preemption(llm: LLM) -> None:
    thought = Thought("<", " the", opened=True)
    wanted = [how(seed, regex="([a-z]+ ){9}", max_tokens=70) for seed in (1, 2, 3)]
    alone = [behind(llm, thought, w).token_ids for w in wanted]
    limits = replace(llm.program.limits, kv_blocks=4, block_size=32, context=128)
    program = native.compile(llm.model.graph, llm.model.weights(), limits)
    tight = Engine(program, llm.model.graph.vocabulary, llm.tokenizer, llm.model.eos_token_ids)
    compiled = [tight.guidance.compile(w.structured_outputs, thought) for w in wanted if w.structured_outputs]
    prompt = llm.tokenizer.encode(PROMPT)
    started = [tight.add(prompt, w, grammar=g)[0] for w, g in zip(wanted, compiled, strict=True)]
    while tight.busy:
        tight.step()
    assert sum(s.preemptions for s in started) >= 1
    assert [s.output.tolist() for s in started] == alone


def test_grammars_may_name_special_tokens(llm: LLM) -> None:
    """As tool calls are marked: by name or number, of which the trial must know."""
    for mark in ("<|endoftext|>", "<[0]>", "<[4000]>"):
        grammar = llm.engine.guidance.compile(StructuredOutputsParams(grammar=f'start: {mark} "ab"'))
        assert np.flatnonzero(grammar.beginning).tolist() == [4000 // 32 if "4000" in mark else 0]
    with pytest.raises(InputError, match="unknown special token"):
        llm.engine.guidance.compile(StructuredOutputsParams(grammar='start: <|nothing|> "ab"'))
    with pytest.raises(InputError, match="takes more than"):
        llm.engine.guidance.compile(
            StructuredOutputsParams(grammar="start: <[4000]> A\nA: /(.*a.{20})/ & ~/(.*b.{21})/")
        )


def test_what_leaves_nothing_to_begin_with_is_refused_before_it_is_queued(llm: LLM) -> None:
    params = replace(how(regex="[ab]{5}"), allowed_token_ids=llm.tokenizer.encode("(", special=False))
    grammar = llm.engine.guidance.compile(StructuredOutputsParams(regex="[ab]{5}"))
    for ask in (llm.engine.check, llm.engine.add):
        with pytest.raises(InputError, match="leave no token with which a structured output begins"):
            ask([1], params, grammar=grammar)
    fine = replace(params, allowed_token_ids=llm.tokenizer.encode("a", special=False))
    assert llm.engine.check([1], fine, grammar=grammar) is not None


def _array(tokens: list[int]) -> Any:
    from array import array

    return array("i", tokens)
