"""Log-probabilities of prompts as evaluation harnesses ask for them, against the evaluation's own scores."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from server.serving import Server, eventually, serve

from hasten import LLM, checkpoint
from hasten.evaluate import perplexity

TEXTS = ["def read_config(path):\n    with open(path) as file:\n", "class Parser:\n    pass\n", "x = 1\ny = 2\n"]


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serve(llm) as running:
        yield running
        eventually(running.idle)


@pytest.fixture(scope="module")
def prompts(reference: LLM) -> list[list[int]]:
    return [list(reference.tokenizer.encode(text)) for text in TEXTS]


@pytest.fixture(scope="module")
def scores(prompts: list[list[int]]) -> list[list[float]]:
    """Of each token but the first, by `hasten eval`'s own way of computing them."""
    model = checkpoint.open("demo").at_context(512)
    windows = [np.array(p, np.int32) for p in prompts]
    found = perplexity.measure(model.graph, model.weights(), windows, threads=1)
    return [w.tolist() for w in found.logprobs]


def parse_logprobs(outputs: dict[str, Any], ctxlens: list[int]) -> list[tuple[float, bool]]:
    """As lm-evaluation-harness 0.4 does for its model "local-completions" (lm_eval/models/openai_completions.py)."""
    found = []
    for choice, ctxlen in zip(sorted(outputs["choices"], key=itemgetter("index")), ctxlens, strict=True):
        values = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        top = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        greedy = all(value == max(alternatives.values()) for value, alternatives in zip(values, top, strict=True))
        found.append((sum(values), greedy))
    return found


def ask(server: Server, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "demo",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = server.post("/v1/completions", {**body, **fields})
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


@pytest.mark.parametrize("context", [1, 4])
def test_a_harness_gets_the_evaluations_log_likelihoods(
    server: Server, prompts: list[list[int]], scores: list[list[float]], context: int
) -> None:
    found = parse_logprobs(ask(server, prompts), [context] * 3)
    assert [value for value, _ in found] == [sum(row[context - 1 :]) for row in scores]


def test_greedy_is_seen(server: Server, reference: LLM, prompts: list[list[int]]) -> None:
    from hasten import SamplingParams

    prompt = prompts[0]
    (best,) = reference.generate([prompt], SamplingParams(temperature=0, max_tokens=4))[0].outputs
    likely, unlikely = [*prompt, *best.token_ids], [*prompt, best.token_ids[0], 7]
    found = parse_logprobs(ask(server, [likely, unlikely]), [len(prompt)] * 2)
    assert [greedy for _, greedy in found] == [True, False]


def test_texts_and_ids_and_no_new_tokens(server: Server, prompts: list[list[int]], scores: list[list[float]]) -> None:
    for prompt in (TEXTS[0], prompts[0]):
        document = ask(server, prompt, max_tokens=0, logprobs=5)
        (choice,) = document["choices"]
        values = choice["logprobs"]["token_logprobs"]
        assert values == [None, *scores[0]]
        assert choice["text"] == TEXTS[0] == "".join(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["top_logprobs"][0] is None
        pairs = zip(choice["logprobs"]["tokens"], values, choice["logprobs"]["top_logprobs"], strict=True)
        assert all(value is None or top[token] == value for token, value, top in pairs)
        assert document["usage"]["completion_tokens"] == 0
        starts = [TEXTS[0][:o] for o in choice["logprobs"]["text_offset"]]
        assert starts == ["".join(choice["logprobs"]["tokens"][:i]) for i in range(len(starts))]


def test_streamed_echo_is_the_same(server: Server) -> None:
    import json

    whole = ask(server, TEXTS[0], max_tokens=5)["choices"][0]
    body = {"prompt": TEXTS[0], "temperature": 0, "max_tokens": 5, "logprobs": 1, "echo": True, "stream": True}
    lines = server.post("/v1/completions", body).text.split("\n\n")
    parts = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(p["text"] for p in parts) == whole["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [v for p in parts for v in p["logprobs"][key]] == whole["logprobs"][key]


def test_prompt_logprobs(server: Server, prompts: list[list[int]], scores: list[list[float]]) -> None:
    document = ask(server, prompts[1], echo=False, logprobs=None, prompt_logprobs=2)
    first, *rest = document["choices"][0]["prompt_logprobs"]
    assert first is None
    for token, value, entries in zip(prompts[1][1:], scores[1], rest, strict=True):
        assert entries[str(token)]["logprob"] == value
        assert len(entries) in (2, 3)
        assert sorted(e["rank"] for e in entries.values() if e["rank"]) == [1, 2]


def test_scored_prompts_are_right_while_others_share_the_step(
    server: Server, prompts: list[list[int]], scores: list[list[float]]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    long = prompts[0] * 8
    alone = ask(server, long)["choices"]
    with ThreadPoolExecutor(6) as pool:
        noise = [pool.submit(ask, server, p, echo=False, max_tokens=60) for p in prompts]
        found = [pool.submit(ask, server, long) for _ in range(3)]
        assert all(f.result()["choices"] == alone for f in found)
        assert all(n.result()["choices"] for n in noise)
