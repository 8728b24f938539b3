"""What goes wrong on our side: full queues, an engine that fails or hangs, requests that fail alone, draining."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server.serving import Server, eventually, serve

from hasten import LLM
from hasten.checkpoint.tokenizer import Tokenizer
from hasten.engine.engine import Engine
from hasten.engine.request import Sequence
from hasten.engine.text import TextStream
from hasten.server.service import ServiceLimits

ASK = {"prompt": "def read", "max_tokens": 8, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def small(llm: LLM) -> Iterator[Server]:
    """Four run at once, two may wait, and a step may take half a second."""
    with serve(llm, service_limits=ServiceLimits(queue=2, stall_seconds=0.5)) as running:
        yield running


def ask(server: Server, **fields: Any) -> httpx.Response:
    return server.post("/v1/completions", {**ASK, **fields})


def test_a_full_queue_is_429_with_retry_after_and_goes_away(small: Server) -> None:
    small.program.open.clear()
    with ThreadPoolExecutor(6) as pool:
        taken = [pool.submit(ask, small) for _ in range(6)]
        eventually(lambda: small.service.active == 6)
        answer = ask(small)
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "overloaded"
        assert ask(small, prompt=["x", "y"]).status_code == 429
        small.program.open.set()
        assert [t.result().status_code for t in taken] == [200] * 6
    assert ask(small).status_code == 200
    eventually(small.idle)
    assert small.service.stats.refused == 2


def test_the_official_client_tries_again_after_429(small: Server) -> None:
    small.program.open.clear()
    with ThreadPoolExecutor(7) as pool:
        taken = [pool.submit(ask, small) for _ in range(6)]
        eventually(lambda: small.service.active == 6)
        with openai.OpenAI(base_url=small.url + "/v1", api_key="x", max_retries=2) as client:
            late = pool.submit(client.completions.create, model="demo", prompt="x", max_tokens=2)
            eventually(lambda: small.service.stats.refused)
            small.program.open.set()
            assert late.result(20).usage.completion_tokens == 2
        assert [t.result().status_code for t in taken] == [200] * 6


def test_several_prompts_are_taken_wholly_or_not_at_all(small: Server) -> None:
    assert ask(small, prompt=["x"] * 7).status_code == 400
    eventually(small.idle)


def test_an_engine_fault_fails_its_requests_and_the_engine_comes_back(
    small: Server, caplog: pytest.LogCaptureFixture
) -> None:
    before = ask(small).json()["choices"]
    small.program.open.clear()
    with ThreadPoolExecutor(3) as pool, caplog.at_level(logging.WARNING, "hasten.server"):
        hit = [pool.submit(ask, small) for _ in range(3)]
        eventually(lambda: small.service.active == 3)
        eventually(lambda: small.service.engine.busy)
        small.program.faults.append(RuntimeError("a bit fell over"))
        small.program.open.set()
        answers = [h.result() for h in hit]
    failed = [a for a in answers if a.status_code == 500]
    assert failed, "nobody was hit"
    assert all("RuntimeError: a bit fell over" in a.json()["error"]["message"] for a in failed)
    assert "a bit fell over" in caplog.text
    health = small.get("/health")
    assert health.status_code == 200
    assert (health.json()["restarts"], health.json()["cause"]) == (1, "RuntimeError: a bit fell over")
    assert ask(small).json()["choices"] == before
    eventually(small.idle)


def test_a_second_fault_ends_it_and_health_says_so(small: Server) -> None:
    for _ in range(2):
        small.program.faults.append(RuntimeError("again"))
        assert ask(small).status_code == 500
    health = small.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    answer = ask(small)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert small.service.active == 0


def test_a_fault_amid_a_stream_is_an_event(small: Server) -> None:
    body = {**ASK, "max_tokens": 200, "stream": True}
    with small.client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        small.program.faults.append(RuntimeError("amid"))
        events = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(events[-2])["error"]["code"] == "engine_fault"
    assert events[-1] == "[DONE]"


def test_a_panic_is_a_fault_too(small: Server) -> None:
    """Rust's panics derive from BaseException: a thread that ends silently would leave clients waiting."""

    class Panic(BaseException):
        pass

    small.program.faults.append(Panic("from below"))
    assert ask(small).status_code == 500
    assert ask(small).status_code == 200


class Panic(BaseException):
    """As Rust's panics come."""


def test_a_panic_while_a_request_is_queued_fails_that_request_too(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in nobody's list then: neither waiting nor running."""
    add = Engine.add

    def panics(self: Engine, *given: Any, **how: Any) -> Any:
        if given[1].seed == 13:
            raise Panic("while queueing")
        return add(self, *given, **how)

    monkeypatch.setattr(Engine, "add", panics)
    assert ask(small, seed=13).status_code == 500
    assert small.service.active == 0
    assert ask(small).status_code == 200
    assert small.service.restarts == 1


def test_a_panic_while_the_engine_is_made_anew_ends_it(small: Server) -> None:
    def fails() -> Engine:
        raise Panic("no second one")

    small.service._make_engine = fails
    small.program.faults.append(RuntimeError("the first"))
    assert ask(small).status_code == 500
    eventually(lambda: not small.service._thread.is_alive())
    assert small.get("/health").json()["status"] == "failed"
    assert ask(small).status_code == 503


def test_a_text_that_cannot_be_ended_is_no_fault_of_the_engine(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client leaves, and what is left of its text fails: nobody wants to know it."""
    finish = TextStream.finish

    def fails(self: TextStream) -> str:
        if "leaves" in self._stops:
            raise RuntimeError("half a character")
        return finish(self)

    monkeypatch.setattr(TextStream, "finish", fails)
    body = {**ASK, "max_tokens": 400, "stream": True, "stop": "leaves"}
    with small.client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    eventually(small.idle)
    assert ask(small).status_code == 200
    assert small.service.stats.faults == 0


def test_a_text_stream_that_cannot_be_made_queues_none_of_the_choices(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    stream = Tokenizer.stream

    def fails(self: Tokenizer, skip_special: bool = True) -> Any:
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("of the second choice")
        return stream(self, skip_special)

    monkeypatch.setattr(Tokenizer, "stream", fails)
    assert ask(small, n=2).status_code == 500
    assert not small.service.engine.busy
    assert not small.service.engine._streams
    assert small.service.restarts == 0


GIVEN_UP = {
    "prompt": "Once upon a time",
    "structured_outputs": {"regex": "(.*[a-m ].{90}){2}"},
    "max_tokens": 400,
    "temperature": 1,
    "seed": 1,
}
"""Its states multiply with every character, until llguidance has enough of it."""


def test_structured_output_that_is_given_up_is_an_error_of_its_request_alone(small: Server) -> None:
    body = {**ASK, **GIVEN_UP, "ignore_eos": False}
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, small, max_tokens=60)
        answer = small.post("/v1/completions", body)
        assert other.result().status_code == 200
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "structured_output_given_up")
    assert "structured output was given up: lexer error: too many states" in error["message"]
    with small.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as streamed:
        events = [line.removeprefix("data: ") for line in streamed.iter_lines() if line]
    assert json.loads(events[-2])["error"]["code"] == "structured_output_given_up"
    assert events[-1] == "[DONE]"
    assert all(json.loads(e)["choices"][0]["finish_reason"] is None for e in events[:-2])
    eventually(small.idle)
    assert (small.service.stats.faults, small.service.stats.finished["error"]) == (0, 2)


def test_a_request_that_fails_alone_takes_nobody_with_it(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    append = Engine._append

    def fails(self: Engine, sequence: Sequence, token: int) -> None:
        if sequence.params.seed == 13 and len(sequence.output) == 3:
            raise RuntimeError("its own trouble")
        append(self, sequence, token)

    monkeypatch.setattr(Engine, "_append", fails)
    small.program.open.clear()
    with ThreadPoolExecutor(3) as pool:
        seeds = [pool.submit(ask, small, seed=seed) for seed in (1, 13, 2)]
        eventually(lambda: small.service.active == 3)
        small.program.open.set()
        assert [s.result().status_code for s in seeds] == [200, 500, 200]
    assert small.service.restarts == 0
    eventually(small.idle)


def test_health_fails_while_a_step_hangs_and_is_well_when_idle(small: Server) -> None:
    assert ask(small).status_code == 200
    time.sleep(0.7)  # longer than a step may take: but there is nothing to do
    assert small.get("/health").status_code == 200
    small.program.open.clear()
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(ask, small)
        eventually(lambda: small.service.active == 1)
        assert small.get("/health").status_code == 200
        eventually(lambda: small.get("/health").status_code == 503)
        assert small.get("/health").json()["status"] == "stalled"
        small.program.open.set()
        assert hung.result().status_code == 200
    assert small.get("/health").status_code == 200


def test_nothing_to_do_costs_no_time(small: Server) -> None:
    ask(small)
    steps, stat = small.program.steps, Path(f"/proc/self/task/{small.service._thread.native_id}/stat")
    if not stat.exists():
        pytest.skip("no /proc here")

    def ticks() -> int:
        return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))

    before = ticks()
    time.sleep(0.5)
    assert (small.program.steps, ticks() - before) == (steps, 0)


def test_draining_lets_what_runs_end_and_takes_nothing_new(llm: LLM) -> None:
    with serve(llm) as server:
        server.program.open.clear()
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(ask, server)
            eventually(lambda: server.service.active == 1)
            server.service.refuse()
            assert server.get("/health").json()["status"] == "draining"
            assert ask(server).status_code == 503
            server.program.open.set()
            eventually(lambda: server.service.active == 0)
            assert running.result().json()["usage"]["completion_tokens"] == 8


def test_what_does_not_end_in_time_is_told(llm: LLM) -> None:
    with serve(llm) as server, ThreadPoolExecutor(1) as pool:
        server.program.open.clear()
        running = pool.submit(ask, server)
        eventually(lambda: server.service.active == 1)
        server.service.refuse()
        threading.Timer(0.1, server.program.open.set).start()
        server.service.stop()
        answer = running.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
