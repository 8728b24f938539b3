"""What a single request may weigh: long texts and large answers, beside which the server goes on."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import tokenizers
from server.serving import Server, eventually, serve

import hasten
from hasten import LLM
from hasten.checkpoint.tokenizer import AT_ONCE, Tokenizer
from hasten.engine import trial
from hasten.engine.guidance import Guidance
from hasten.server import streams
from hasten.server.config import HttpLimits
from hasten.server.service import ServiceLimits

DEMO = Path(hasten.__file__).parent / "demo"
ODD = (
    "a b c d ",
    "中文字符",
    "👩‍👩‍👧 ",
    "\n\n\t",
    "<|im_end|>",
    "\u0301e",
    "\x00",
    "word" * 50,
    "0123 ",
    "def f(x):\n    return x\n",
)


@contextmanager
def healthy(server: Server) -> Iterator[None]:
    """Meanwhile /health always answers within a second."""
    worst, over = [0.0], [False]

    def look() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over[0]:
                begun = time.monotonic()
                assert client.get("/health").status_code == 200
                worst[0] = max(worst[0], time.monotonic() - begun)
                time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            yield
        finally:
            over[0] = True
            looking.result()
    assert worst[0] < 1, f"/health took {worst[0]:.2f} s"


def at_once(*asks: Callable[[], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(asks)) as pool:
        return [each.result() for each in [pool.submit(ask) for ask in asks]]


@pytest.mark.parametrize("special", [True, False])
def test_long_texts_have_the_tokens_that_the_library_gives_them(special: bool) -> None:
    ours, library = Tokenizer(DEMO), tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for text in (*((odd * (AT_ONCE // len(odd) + 2)) for odd in ODD), "".join(ODD) * 40):
        assert len(text) > AT_ONCE
        assert ours.encode(text, special) == library.encode(text, add_special_tokens=special).ids


def test_long_texts_stop_nobody_else(llm: LLM) -> None:
    text = "a b c d " * (1 << 17)
    cut = {"prompt": text, "max_tokens": 1, "truncate_prompt_tokens": 1}
    with serve(llm) as server:
        with healthy(server):
            answers = at_once(
                *[lambda: server.post("/tokenize", {"prompt": text})] * 2,
                *[lambda: server.post("/v1/completions", cut)] * 2,
            )
        assert [a.status_code for a in answers] == [200] * 4
        assert answers[0].json()["count"] > 100_000
        assert answers[2].json()["usage"]["prompt_tokens"] == 1


def test_a_text_too_long_is_refused_everywhere(llm: LLM) -> None:
    limits = HttpLimits(prompt_characters=5000)
    said = [{"role": "user", "content": "a" * 5001}]
    asks = (
        ("/tokenize", {"prompt": "a" * 5001}, "prompt"),
        ("/tokenize", {"messages": said}, "messages"),
        ("/v1/completions", {"prompt": "a" * 5001, "truncate_prompt_tokens": 1}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "a" * 5001], "truncate_prompt_tokens": 1}, "prompt"),
        ("/v1/chat/completions", {"messages": said, "truncate_prompt_tokens": 1}, "messages"),
        ("/detokenize", {"tokens": [5] * 5001}, "tokens"),
    )
    with serve(llm, limits=limits) as server:
        for path, document, field in asks:
            answer = server.post(path, document)
            assert answer.status_code == 400, path
            assert answer.json()["error"]["param"] == field
            assert "at most 5000" in answer.json()["error"]["message"]
        assert server.post("/tokenize", {"prompt": "a" * 5000}).status_code == 200


# --- grammars


def structured(server: Server, pattern: str, **fields: object) -> httpx.Response:
    asked = {"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": pattern}, **fields}
    return server.post("/v1/completions", asked)


def test_no_grammar_is_compiled_where_there_is_no_room(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    with serve(llm, service_limits=ServiceLimits(queue=4)) as server, ThreadPoolExecutor(1) as pool:
        server.program.open.clear()
        running = pool.submit(server.post, "/v1/completions", {"prompt": "a", "n": 6, "max_tokens": 1})
        eventually(lambda: server.service.active == 6)
        monkeypatch.setattr(Guidance, "compile", lambda *_: pytest.fail("it was compiled"))
        for fields in ({"n": 3}, {"prompt": ["a", "b", "c"]}):
            answer = structured(server, "[ab]+", **fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
            assert "retry-after" in answer.headers
        server.program.open.set()
        assert running.result().status_code == 200


def test_matchers_are_made_for_those_that_run(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' are made one at a time, as choices begin: none of them on the engine's thread."""
    pytest.importorskip("llguidance")
    made: list[tuple[str, int]] = []
    make = Guidance._matcher

    def counted(self: Guidance, kind: str, source: str) -> object:
        made.append((threading.current_thread().name, server.service.active))
        return make(self, kind, source)

    monkeypatch.setattr(Guidance, "_matcher", counted)
    with serve(llm) as server:
        answer = structured(server, "[ab]{2}", prompt=["a", "b", "c"], n=4, max_tokens=8)
        assert [c["finish_reason"] for c in answer.json()["choices"]] == ["stop"] * 12
    assert [active for _, active in made].count(0) == 4, "max_batch is 4"
    assert all(name.startswith("hasten-grammar") for name, _ in made[:4])
    assert 12 <= len(made) <= 13 + 8


def test_few_may_wait_for_their_grammar(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    go, begun = threading.Event(), []
    make = Guidance._matcher

    def slow(self: Guidance, kind: str, source: str) -> object:
        begun.append(source)
        go.wait(30)
        return make(self, kind, source)

    monkeypatch.setattr(Guidance, "_matcher", slow)
    with serve(llm, limits=HttpLimits(grammars=1)) as server, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(structured, server, f"[ab]{{{i}}}") for i in (1, 2, 3)]
        eventually(lambda: len(begun) == 2 and server.app.state.context._compiling == 3)
        refused = structured(server, "[ab]{4}")
        go.set()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert [a.result().status_code for a in asked] == [200] * 3
        assert structured(server, "[ab]{4}").status_code == 200


def test_a_trial_goes_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    seen: list[int] = []
    monkeypatch.setattr("hasten.engine.trial.os.nice", seen.append)
    monkeypatch.setattr("hasten.engine.trial.resource.setrlimit", lambda *_: None)
    monkeypatch.setattr(
        "hasten.engine.trial.json.load", lambda _: {"grammar": 'start: "a"', "vocabulary": 300, "special": []}
    )
    monkeypatch.setattr("hasten.engine.trial.sys.stdout", SimpleNamespace(buffer=io.BytesIO()))
    trial.main()
    assert seen == [10]


@pytest.mark.parametrize(
    ("fields", "name"), [({"n": 9}, "n"), ({"prompt": ["a"] * 9}, "prompt"), ({"prompt": ["a"] * 3, "n": 3}, "prompt")]
)
def test_what_can_never_fit_is_no_matter_of_waiting(llm: LLM, fields: dict[str, object], name: str) -> None:
    with serve(llm, service_limits=ServiceLimits(queue=4)) as server:
        answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "n": 8}).status_code == 200


# --- large answers


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"logprobs": 5, "max_tokens": 10, "n": 4}, "logprobs"),  # 10 x 6 x 4
        ({"logprobs": 0, "max_tokens": 201}, "logprobs"),
        ({"logprobs": 4, "max_tokens": 0, "echo": True, "prompt": [[5] * 30, [6] * 30]}, "logprobs"),
        ({"prompt_logprobs": 9, "max_tokens": 1, "prompt": [5] * 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 3, "logprobs": 3, "max_tokens": 30, "n": 2, "prompt": [5] * 20}, "logprobs"),
    ],
)
def test_log_probabilities_of_an_answer_are_counted(llm: LLM, fields: dict[str, object], name: str) -> None:
    with serve(llm, limits=HttpLimits(values=200)) as server:
        answer = server.post("/v1/completions", {"prompt": "a", **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        said = {"messages": [{"role": "user", "content": "a"}]}
        answer = server.post(
            "/v1/chat/completions", {**said, "logprobs": True, "top_logprobs": 5}
        )  # to the context's end
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_logprobs")
        fits = {"prompt": [5] * 4, "logprobs": 4, "max_tokens": 10, "n": 4}
        assert server.post("/v1/completions", fits).status_code == 200
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 400}).status_code == 200


def test_a_large_answer_stops_nobody_else(llm: LLM) -> None:
    prompts = [[5 + i, *range(10, 505)] for i in range(48)]
    asked = {"prompt": prompts, "echo": True, "logprobs": 20, "max_tokens": 0}  # 499,968 values
    with serve(llm) as server, healthy(server):
        answer = server.client.post("/v1/completions", json=asked, timeout=120)
        assert answer.status_code == 200
        assert server.client.post("/v1/completions", json={**asked, "n": 2}).json()["error"]["param"] == "logprobs"
    choices = json.loads(answer.content)["choices"]
    assert [len(c["logprobs"]["top_logprobs"]) for c in choices] == [496] * 48


@pytest.mark.parametrize("size", [0, 1, 199, 200, 201, 1000])
def test_documents_encoded_in_pieces_are_the_same(size: int) -> None:
    entries = [{"token": f"é{i}", "logprob": -i / 7, "bytes": [1, 2], "top_logprobs": []} for i in range(size)]
    choice = {
        "index": 0,
        "text": 'a"\n\ud800',
        "logprobs": {"content": entries, "refusal": None},
        "finish_reason": None,
    }
    for choices in ([], [choice], [choice] * 3):
        document = {"id": "ü", "choices": choices, "prompt_logprobs": [None, *entries], "usage": {"total_tokens": 1}}
        expected = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        assert asyncio.run(streams.encoded_apart(document)) == expected
        assert b"".join(streams._pieces(document)) == expected
