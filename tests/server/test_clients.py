"""What OpenAI's own client gets, beside what the offline engine gives for the same request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server.serving import Server, eventually, serve
from support import ROOT

from hasten import LLM, SamplingParams

PROMPT = "def read_config(path"
HOW: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_tokens": 24, "top_p": 0.95}
MESSAGES = [{"role": "user", "content": "Read a file"}]


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serve(llm) as running:
        yield running
        eventually(running.idle)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(reference: LLM, prompt: str | list[int], **how: Any) -> Any:
    return reference.generate([prompt], SamplingParams(**{**HOW, "logprobs": 3, **how}))[0].outputs


def floats(output: Any) -> list[dict[float, int]]:
    return [sorted(entry.logprob for entry in position.values()) for position in output.logprobs]


def test_completion(client: openai.OpenAI, reference: LLM) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, logprobs=3, **HOW)
    (wanted,) = expected(reference, PROMPT)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (wanted.text, wanted.finish_reason)
    drawn = [p[t].logprob for p, t in zip(wanted.logprobs, wanted.token_ids, strict=True)]
    assert choice.logprobs.token_logprobs == drawn
    assert choice.logprobs.tokens == [
        p[t].decoded_token for p, t in zip(wanted.logprobs, wanted.token_ids, strict=True)
    ]
    assert [sorted(top.values()) for top in choice.logprobs.top_logprobs] == floats(wanted)
    assert all(
        top[t] == v for top, t, v in zip(choice.logprobs.top_logprobs, choice.logprobs.tokens, drawn, strict=True)
    )
    prompt = len(reference.tokenizer.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 24)


def test_completion_streamed(client: openai.OpenAI, reference: LLM) -> None:
    stream = client.completions.create(
        model="demo", prompt=PROMPT, logprobs=3, stream=True, stream_options={"include_usage": True}, **HOW
    )
    *parts, last = list(stream)
    (wanted,) = expected(reference, PROMPT)
    assert "".join(p.choices[0].text for p in parts) == wanted.text
    values = [v for p in parts for v in p.choices[0].logprobs.token_logprobs]
    assert values == [p[t].logprob for p, t in zip(wanted.logprobs, wanted.token_ids, strict=True)]
    offsets = [o for p in parts for o in p.choices[0].logprobs.text_offset]
    assert offsets == sorted(offsets)
    assert [p.choices[0].finish_reason for p in parts] == [None] * (len(parts) - 1) + ["length"]
    assert all(p.usage is None for p in parts)
    assert last.choices == []
    assert last.usage.completion_tokens == 24


def test_chat(client: openai.OpenAI, reference: LLM) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True, top_logprobs=2, **HOW)
    (wanted,) = expected(reference, reference.chat_prompt(MESSAGES), logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    drawn = [p[t].logprob for p, t in zip(wanted.logprobs, wanted.token_ids, strict=True)]
    assert [entry.logprob for entry in choice.logprobs.content] == drawn
    assert b"".join(bytes(e.bytes) for e in choice.logprobs.content).decode() == wanted.text
    best = [[e.logprob for e in entry.top_logprobs] for entry in choice.logprobs.content]
    assert all(len(b) == 2 and b == sorted(b, reverse=True) for b in best)
    assert answer.usage.prompt_tokens == len(reference.chat_prompt(MESSAGES))


def test_chat_streamed(client: openai.OpenAI, reference: LLM) -> None:
    parts = list(client.chat.completions.create(model="demo", messages=MESSAGES, stream=True, **HOW))
    (wanted,) = expected(reference, reference.chat_prompt(MESSAGES))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == wanted.text
    first = parts[0].choices[0].delta
    assert (first.role, bool(first.content)) == ("assistant", True), "no chunk before the first token"
    assert all(p.choices[0].delta.role is None for p in parts[1:])
    assert parts[-1].choices[0].finish_reason == "length"


def test_content_in_parts_and_max_completion_tokens(client: openai.OpenAI, reference: LLM) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Read a file"}]}]
    how = {**HOW, "max_tokens": None, "max_completion_tokens": 24}
    answer = client.chat.completions.create(model="demo", messages=parts, **how)
    assert answer.choices[0].message.content == expected(reference, reference.chat_prompt(MESSAGES))[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(client: openai.OpenAI, reference: LLM, stream: bool) -> None:
    prompts = [PROMPT, "class Parser"]
    answer = client.completions.create(model="demo", prompt=prompts, n=2, stream=stream, **HOW)
    texts = dict.fromkeys(range(4), "")
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    wanted = [o.text for p in prompts for o in expected(reference, p, n=2)]
    assert list(texts.values()) == wanted
    assert len(set(wanted)) == 4


def test_prompts_as_token_ids(client: openai.OpenAI, reference: LLM) -> None:
    ids = reference.tokenizer.encode(PROMPT)
    wanted = expected(reference, PROMPT)[0].text
    for prompt in (ids, [ids], [ids, ids]):
        answer = client.completions.create(model="demo", prompt=prompt, **HOW)
        assert {c.text for c in answer.choices} == {wanted}


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_may_be_kept(client: openai.OpenAI, reference: LLM, stream: bool) -> None:
    whole = expected(reference, PROMPT)[0].text
    stop = whole[9:12]
    extra = {"include_stop_str_in_output": True}
    answer = client.completions.create(model="demo", prompt=PROMPT, stop=stop, stream=stream, extra_body=extra, **HOW)
    choices = [p.choices[0] for p in (answer if stream else [answer])]
    assert "".join(c.text for c in choices) == whole[: whole.index(stop) + len(stop)]
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", stop)


def test_prompt_logprobs_of_a_chat(server: Server, reference: LLM) -> None:
    """The same floats as the completions endpoint gives for the same tokens."""
    prompt = reference.chat_prompt(MESSAGES)
    how = {"max_tokens": 2, "prompt_logprobs": 2, "n": 2}
    found = server.post("/v1/chat/completions", {"messages": MESSAGES, **how}).json()
    plain = server.post("/v1/completions", {"prompt": prompt, **how}).json()
    assert found["prompt_logprobs"] == plain["choices"][0]["prompt_logprobs"]
    assert len(found["prompt_logprobs"]) == len(prompt)
    assert len(found["choices"]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_end_it(client: openai.OpenAI, reference: LLM, stream: bool) -> None:
    whole = expected(reference, PROMPT)[0].text
    stop = whole[9:12]
    answer = client.completions.create(model="demo", prompt=PROMPT, stop=[stop, "\x00"], stream=stream, **HOW)
    choices = [p.choices[0] for p in (answer if stream else [answer])]
    assert "".join(c.text for c in choices) == whole[: whole.index(stop)]
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", stop)


def test_extra_fields_of_other_servers(client: openai.OpenAI, reference: LLM) -> None:
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 3}
    neutral = {"typical_p": 1.0, "logit_bias": {}, "skip_special_tokens": True, "priority": 2, "cache_salt": "mine"}
    body = {**extra, **neutral, "suffix": None, "best_of": None, "response_format": {"type": "text"}, "user": "me"}
    answer = client.completions.create(model="demo", prompt=PROMPT, extra_body=body, **HOW)
    assert answer.choices[0].text == expected(reference, PROMPT, **extra)[0].text


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_a_schema(client: openai.OpenAI, stream: bool) -> None:
    format: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format=format, max_tokens=60, seed=3, stream=stream
    )
    if stream:
        choices = [p.choices[0] for p in answer]
        text, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    found = json.loads(text)
    assert (set(found), reason) == ({"name", "age"}, "stop")
    assert found["name"] in ("Ada", "Bo")
    assert found["age"] in range(100)


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [({"regex": "[ab]{5}"}, "[ab]{5}"), ({"choice": ["yes", "no"]}, "yes|no"), ({"grammar": 'start: "x" "y"+'}, "xy+")],
)
def test_other_structured_outputs(server: Server, asked: dict[str, Any], pattern: str) -> None:
    body = {"prompt": PROMPT, "structured_outputs": asked, "max_tokens": 20, "n": 2}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert all(re.fullmatch(pattern, c["text"]) or c["finish_reason"] == "length" for c in choices)
    assert "x" not in asked or len(choices) == 2


def test_biases_and_bans(server: Server, reference: LLM) -> None:
    (token,) = reference.tokenizer.encode("(")
    ask = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 0}

    def tokens(**fields: Any) -> list[str]:
        answer = server.post("/v1/completions", {**ask, **fields}).json()
        found: list[str] = answer["choices"][0]["logprobs"]["tokens"]
        return found

    assert tokens(allowed_token_ids=[token]) == ["("] * 6
    assert tokens(logit_bias={str(token): 100}) == ["("] * 6
    plain = tokens()
    assert plain[0] not in tokens(bad_words=[plain[0]])[:1]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("demo", 512)
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="no model 'other' here; this server has demo"):
        client.completions.create(model="other", prompt="x")


def test_embeddings_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        client.embeddings.create(model="demo", input="x")


def test_tokenize_and_detokenize(server: Server, reference: LLM) -> None:
    found = server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    ids = reference.tokenizer.encode(PROMPT)
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 512)
    assert found["token_strs"] == [reference.tokenizer.token(i) for i in ids]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": PROMPT}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()
    assert chat["tokens"] == reference.chat_prompt(MESSAGES)


def test_metrics_count(server: Server) -> None:
    def value(name: str) -> float:
        lines = server.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(name + " ")))

    before = value("hasten_generated_tokens_total"), value("hasten_prefix_hit_tokens_total")
    long = "x = 1\n" * 40
    for _ in range(2):
        assert server.post("/v1/completions", {"prompt": long, "max_tokens": 5}).status_code == 200
    assert value("hasten_generated_tokens_total") == before[0] + 10
    assert value("hasten_prefix_hit_tokens_total") >= before[1] + 32
    assert value("hasten_requests_running") == 0
    assert value("hasten_kv_cache_usage_ratio") == 0
    assert value("hasten_time_to_first_token_seconds_count") >= 2


def test_the_dashboard_shows_metrics_that_exist(server: Server) -> None:
    text = server.get("/metrics").text
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    shown = {
        name for panel in dashboard["panels"] for t in panel["targets"] for name in re.findall(r"hasten_\w+", t["expr"])
    }
    assert {name for name in shown if f"\n{name}" not in text} == set()
    counted = set(re.findall(r"^# TYPE (hasten_\w+) ", text, re.M))
    assert {c for c in counted if not any(name.startswith(c.removesuffix("_total")) for name in shown)} <= {
        "hasten_engine_restarts_total"
    }
