"""The client against a server of the test's own: its figures are those the server noted, its errors those it met."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench.load_server import HEAD, Answer, Reply, Server, serving, well

from hasten.bench.load import client, run, summary
from hasten.bench.load.arrivals import Load, Schedule, planned
from hasten.bench.load.client import Record, Target, parse_url
from hasten.bench.load.prompts import Bodies, Prompts, id_pieces
from hasten.bench.load.run import Result
from hasten.errors import InputError

SLACK = 0.1  # seconds that a busy machine may add to what was waited for


def drive(server: Server, load: Load, *, timeout: float = 20, warmup: int = 0, usage: bool = True) -> Result:
    target = replace(parse_url(server.url), address="127.0.0.1")
    bodies = Bodies(Prompts(id_pieces(10, 1000), seed=load.seed), "m", usage=usage)
    return asyncio.run(
        run.drive(
            target,
            load,
            planned(Schedule(load)),
            bodies,
            endpoint="/completions",
            timeout=timeout,
            warmup=warmup,
            report=lambda stage, done, total: None,
        )
    )


def one(answer: Answer, *, timeout: float = 20, usage: bool = True) -> tuple[Record, dict[str, Any]]:
    """A single request of 8 tokens for 4, and the summary of it."""
    with serving(answer) as server:
        result = drive(server, Load(clients=1, limit=1, prompt=(8, 8), new=4), timeout=timeout, usage=usage)
    assert len(result.records) == 1
    return result.records[0], summary.summarise(result, {})


# --- what is measured


def test_latencies_are_those_the_server_noted() -> None:
    async def answer(reply: Reply) -> None:
        number = len([s for s in server.seen if s.method == "POST"])
        await well(reply, first=0.02 * (number % 5), gap=0.004 * (1 + number % 3))

    with serving(answer) as server:
        result = drive(server, Load(rate=60.0, limit=40, prompt=(5, 9), new=6, seed=1))
    found = summary.summarise(result, {})
    assert found["requests"] == {
        "planned": 40,
        "sent": 40,
        "completed": 40,
        "refused": 0,
        "failed": 0,
        "unfinished": 0,
    }
    seen = server.seen  # every event of a request: its 6 texts, usage, [DONE]
    assert {len(s.sent) for s in seen} == {8}
    expected = {
        "ttft": [s.sent[0] - s.at for s in seen],
        "tpot": [(s.sent[5] - s.sent[0]) / 5 for s in seen],
        "itl": [b - a for s in seen for a, b in zip(s.sent[:5], s.sent[1:6], strict=True)],
        "e2e": [s.sent[7] - s.at for s in seen],
    }
    for name, values in expected.items():
        assert found["latency_ms"][name]["count"] == len(values)
        for point in (50, 90, 99):
            noted = np.percentile(values, point) * 1e3
            assert found["latency_ms"][name][f"p{point}"] == pytest.approx(noted, abs=SLACK * 1e3), (name, point)
        assert found["latency_ms"][name]["mean"] == pytest.approx(np.mean(values) * 1e3, abs=SLACK * 1e3)
    ttft = found["latency_ms"]["ttft"]
    assert ttft["p99"] > 80 > ttft["p50"] > 40 - 1  # of 0, 20, 40, 60 and 80 ms
    assert found["latency_ms"]["tpot"]["p50"] >= 8 - 0.1  # of 4, 8 and 12 ms
    assert found["tokens"]["output"] == 240
    assert found["tokens"]["prompt"] == sum(len(s.body["prompt"]) for s in seen)
    assert found["rates"]["output_tokens_per_second"] == pytest.approx(240 / found["seconds"])
    span = max(s.sent[7] for s in seen) - min(s.at for s in seen)
    assert found["seconds"] == pytest.approx(span, abs=SLACK)


def record(number: int = 0, **more: Any) -> Record:
    made = Record(number, 10, 4)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def completed(started: float, chunks: list[float], finished: float, **more: Any) -> Record:
    made = record(started=started, finished=finished, outcome="completed", **more)
    made.chunks.extend(chunks)
    return made


def test_figures_of_known_times() -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(0.1, (57, 5)), axis=1)  # [request, first to fourth text and end]
    records = [completed(0.0, row[:4].tolist(), float(row[4])) for row in times]
    found = summary.latencies(records)
    expected = {
        "ttft": times[:, 0],
        "tpot": (times[:, 3] - times[:, 0]) / 3,
        "itl": np.diff(times[:, :4], axis=1).ravel(),
        "e2e": times[:, 4],
    }
    for name, values in expected.items():
        figures = found[name]
        assert figures is not None
        assert [figures[f"p{p}"] for p in (50, 90, 99)] == pytest.approx(1e3 * np.percentile(values, (50, 90, 99)))
        assert figures["max"] == pytest.approx(1e3 * values.max())
        assert figures["mean"] == pytest.approx(1e3 * values.mean())


def test_goodput_counts_what_met_every_limit() -> None:
    limits = summary.parse_limits(("ttft=500ms", "tpot=0.1s"))
    assert limits == {"ttft": 0.5, "tpot": 0.1}
    fine = completed(1.0, [1.5, 1.6, 1.7, 1.79], 2.0)
    cases = {
        "fine": fine,
        "late": completed(1.0, [1.51, 1.6, 1.7, 1.8], 2.0),
        "slow": completed(1.0, [1.2, 1.3, 1.4, 1.51], 2.0),
        "silent": completed(1.0, [], 2.0),
        "one token": completed(1.0, [1.5], 2.0),
        "refused": record(started=1.0, finished=1.1, outcome="refused", error="HTTP 429"),
    }
    assert [name for name, r in cases.items() if summary.good(r, limits)] == ["fine", "one token"]
    result = Result(start=1.0, end=3.0, records=list(cases.values()))
    goodput = summary.summarise(result, limits)["goodput"]
    assert goodput["good"] == 2
    assert goodput["share"] == pytest.approx(2 / 6)
    assert goodput["requests_per_second"] == pytest.approx(2 / 1.0)  # from 1.0 to the last end, 2.0
    assert not summary.good(fine, {"e2e": 0.9})


@pytest.mark.parametrize(
    "text", ["ttft", "ttft=5", "ttft=-5ms", "itl=5ms", "ttft=5ms ", "ttft=1e3ms", "=5ms", "ttft=nanms"]
)
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="is no limit"):
        summary.parse_limits((text,))


def test_a_limit_twice() -> None:
    with pytest.raises(InputError, match="limits ttft twice"):
        summary.parse_limits(("ttft=1s", "ttft=2s"))


def test_the_most_under_way() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, None)]
    records = [record(started=a, finished=b) for a, b in spans]
    assert summary.under_way(records, 5.0) == 3  # from 2.5 to 3; what ends at 2 is over when the next begins
    assert summary.under_way([], 5.0) == 0


def test_tokens_are_counted_where_the_server_does_not() -> None:
    async def answer(reply: Reply) -> None:
        await reply.raw(HEAD)
        for text in ("a", "b", "", "c"):
            await reply.text(text)
        await reply.done()

    found, figures = one(answer, usage=False)
    assert found.outcome == "completed"
    assert (summary.output_tokens(found), summary.prompt_tokens(found)) == (3, 8)
    assert figures["tokens"]["counted_by_chunks"] == 1
    assert figures["tokens"]["short_answers"] == 1


def test_the_first_text_counts_not_the_role() -> None:
    async def answer(reply: Reply) -> None:
        await reply.raw(HEAD)
        await reply.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(0.2)
        await reply.event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
        await reply.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        await reply.done()

    found, figures = one(answer)
    assert found.finish_reason == "length"
    assert len(found.chunks) == 1
    assert figures["latency_ms"]["ttft"]["p50"] > 199


def test_a_stream_in_single_bytes() -> None:
    async def answer(reply: Reply) -> None:
        await reply.raw(HEAD)
        for text in ("é", "ß"):
            data = json.dumps({"choices": [{"text": text}]}, ensure_ascii=False).encode()
            for byte in b": ping\r\n\r\ndata: " + data + b"\r\n\r\n":
                await reply.chunk(bytes([byte]))
        await reply.usage(8, 2, prompt_tokens_details={"cached_tokens": 5})
        await reply.done()

    found, figures = one(answer)
    assert (found.outcome, len(found.chunks)) == ("completed", 2)
    assert figures["tokens"]["cached"] == 5


def test_a_server_that_does_not_close_is_not_waited_for() -> None:
    async def answer(reply: Reply) -> None:
        await reply.raw(HEAD)
        await reply.text()
        await reply.event(b"[DONE]")
        await asyncio.sleep(30)

    started = time.monotonic()
    found, _ = one(answer)
    assert found.outcome == "completed"
    assert found.finished - found.started < 1
    assert time.monotonic() - started < 10


# --- what goes wrong


async def cut(reply: Reply) -> None:
    await reply.raw(HEAD)
    await reply.text()


def saying(status: int, body: bytes = b"", **headers: str) -> Answer:
    async def answer(reply: Reply) -> None:
        await reply.status(status, body, **headers)

    return answer


def sending(data: bytes) -> Answer:
    async def answer(reply: Reply) -> None:
        await reply.raw(data)

    return answer


def streaming(*events: bytes) -> Answer:
    async def answer(reply: Reply) -> None:
        await reply.raw(HEAD)
        await reply.text()
        for event in events:
            await reply.chunk(event)
        await reply.raw(b"0\r\n\r\n")

    return answer


MESSAGE = b'{"error": {"message": "the \\u001b[2J queue is full"}}'
LIE = b'data: {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 900}}\n\n'


@pytest.mark.parametrize(
    ("answer", "outcome", "error", "detail"),
    [
        (saying(429, MESSAGE, Retry_After="3"), "refused", "HTTP 429", "the [2J queue is full"),
        (saying(429), "refused", "HTTP 429", ""),
        (saying(503, MESSAGE, Retry_After="1"), "refused", "HTTP 503", "the [2J queue is full"),
        (saying(503, b"<html>\r\n<b>down</b>"), "failed", "HTTP 503", "<html> <b>down</b>"),
        (saying(500, b"x" * 5_000_000), "failed", "HTTP 500", "x" * 197 + "..."),
        (saying(400, b'{"detail": "min_tokens: not known"}'), "failed", "HTTP 400", "min_tokens: not known"),
        (saying(302, Location="http://elsewhere/"), "failed", "HTTP 302", ""),
        (saying(204), "failed", "HTTP 204", ""),
        (
            saying(200, b"{}", Content_Type="application/json"),
            "failed",
            "malformed answer",
            "content-type is application",
        ),
        (sending(b""), "failed", "disconnected", "no answer"),
        (sending(b"\x15\x03\x01\x00\x02\x02"), "failed", "disconnected", "the connection closed within"),
        (sending(b"220 mail ready\r\n"), "failed", "malformed answer", "no HTTP status line: 220 mail ready"),
        (cut, "failed", "disconnected", "the connection closed within the answer"),
        (streaming(), "failed", "cut short", "the stream ended without [DONE]"),
        (streaming(b"data: [DONE]"), "failed", "cut short", "the stream ended without [DONE]"),
        (streaming(b"data: {oops\n\n"), "failed", "malformed answer", "an event is not valid JSON: {oops"),
        (streaming(b"data: " + b"x" * (2 << 20)), "failed", "malformed answer", "a line of the stream is longer than"),
        (streaming(b'data: {"error": {"message": "out of blocks"}}\n\n'), "failed", "error in stream", "out of blocks"),
        (streaming(LIE), "failed", "malformed answer", "completion_tokens is 900, max_tokens was 4"),
    ],
)
def test_what_goes_wrong_is_named(answer: Answer, outcome: str, error: str, detail: str) -> None:
    found, figures = one(answer)
    assert (found.outcome, found.error) == (outcome, error)
    assert detail in found.detail
    assert found.detail.isprintable() or not found.detail
    assert figures["requests"][outcome] == 1
    assert figures["rates"]["output_tokens_per_second"] == 0
    (told,) = figures["errors"]
    assert (told["outcome"], told["error"], told["count"]) == (outcome, error, 1)
    assert told["first"] == {"request": 0, "detail": found.detail}


def test_an_endless_refusal_is_read_no_further() -> None:
    async def answer(reply: Reply) -> None:
        await reply.raw(b"HTTP/1.1 500 Oh\r\n\r\nno, ")
        while True:
            await reply.raw(b"no, " * 10_000)

    found, _ = one(answer, timeout=10)
    assert (found.error, found.detail[:7]) == ("HTTP 500", "no, no,")
    assert one(answer, timeout=10)[0].detail.endswith("...")


def test_refusals_say_how_long_to_wait() -> None:
    found, figures = one(saying(429, Retry_After="3"))
    assert found.retry_after == 3.0
    assert figures["errors"][0]["with_retry_after"] == 1
    assert one(saying(429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT"))[0].retry_after is None


def test_a_silent_server_is_given_up() -> None:
    async def answer(reply: Reply) -> None:
        await asyncio.sleep(30)

    found, _ = one(answer, timeout=0.3)
    assert (found.outcome, found.error, found.detail) == ("failed", "timeout", "no end after 0.3 s")
    assert found.finished is not None
    assert 0.3 <= found.finished - found.started < 5


def test_nobody_there() -> None:
    with serving() as server:
        pass
    result = drive(server, Load(rate=100.0, limit=3))
    assert [(r.outcome, r.error) for r in result.records] == [("failed", "no connection")] * 3
    assert summary.summarise(result, {})["latency_ms"] == dict.fromkeys(("ttft", "tpot", "itl", "e2e"))


def test_one_failure_takes_no_other_with_it() -> None:
    async def answer(reply: Reply) -> None:
        number = len(server.seen)
        await (cut(reply) if number % 3 == 0 else saying(500)(reply) if number % 3 == 1 else well(reply))

    with serving(answer) as server:
        result = drive(server, Load(rate=300.0, limit=30, prompt=(2, 2), new=3))
    counts = summary.summarise(result, {})
    assert (counts["requests"]["completed"], counts["requests"]["failed"]) == (10, 20)
    assert sorted((e["error"], e["count"]) for e in counts["errors"]) == [("HTTP 500", 10), ("disconnected", 10)]


# --- the load itself


def test_a_stalled_server_does_not_slow_arrivals() -> None:
    """Open loop: all 40 are sent within their second though none is answered until a second later."""

    async def answer(reply: Reply) -> None:
        await asyncio.sleep(max(0.0, server.seen[0].at + 2.0 - time.monotonic()))
        await well(reply)

    load = Load(rate=40.0, limit=40, prompt=(2, 2), new=2, seed=5)
    with serving(answer) as server:
        result = drive(server, load)
    due = [a.at for a in Schedule(load)]
    came = [s.at - server.seen[0].at + due[0] for s in server.seen]
    assert came == pytest.approx(due, abs=0.3)
    figures = summary.summarise(result, {})
    assert figures["client"]["most_under_way"] == 40
    assert figures["client"]["send_lag_ms"]["p50"] < SLACK * 1e3
    assert figures["requests"]["completed"] == 40
    assert figures["latency_ms"]["ttft"]["max"] > 900


def test_a_slow_client_shows() -> None:
    """The lag of a client that cannot keep up is in its report: here its loop is held up for a while."""

    async def answer(reply: Reply) -> None:
        await well(reply)

    plain = run._Run._one
    calls = []

    async def held_up(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            time.sleep(0.4)
        return await plain(self, *arguments)

    with serving(answer) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._Run, "_one", held_up)
        result = drive(server, Load(rate=100.0, limit=60, prompt=(2, 2), new=2))
    own = summary.summarise(result, {})["client"]
    assert own["send_lag_ms"]["max"] > 200
    assert own["loop_lag_ms"]["max"] > 300


def test_a_closed_loop_has_so_many_under_way() -> None:
    inside: list[int] = []
    now = [0]

    async def answer(reply: Reply) -> None:
        now[0] += 1
        inside.append(now[0])
        await asyncio.sleep(0.02)
        now[0] -= 1  # before the last byte, so that the client's next is never counted twice
        await well(reply)

    with serving(answer) as server:
        result = drive(server, Load(clients=3, limit=30, prompt=(2, 2), new=2))
    assert len(result.records) == len(inside) == 30
    assert max(inside) == 3
    assert summary.under_way(result.records, result.end) == 3
    assert len({json.dumps(s.body["prompt"]) for s in server.seen}) > 25  # each has a prompt of its own


def test_a_closed_loop_ends_in_time() -> None:
    async def answer(reply: Reply) -> None:
        await well(reply, first=0.05)

    with serving(answer) as server:
        result = drive(server, Load(clients=2, duration=0.5, prompt=(2, 2), new=2))
    assert result.planned is None
    assert all(r.outcome == "completed" for r in result.records)
    assert 4 <= len(result.records) <= 22
    assert max(r.started for r in result.records) - result.start < 0.5 + SLACK


def test_a_closed_loop_heeds_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(reply: Reply) -> None:
        if len(server.seen) == 1:
            await reply.status(429, Retry_After="1")
        else:
            await well(reply)

    with serving(answer) as server:
        result = drive(server, Load(clients=1, limit=2, prompt=(2, 2), new=2))
    assert [r.outcome for r in result.records] == ["refused", "completed"]
    assert server.seen[1].at - server.seen[0].at >= 1.0
    monkeypatch.setattr(run, "MOST_PAUSE", 0.1)
    assert run._pause(record(outcome="refused", retry_after=1e6)) == 0.1


def test_a_warm_up_is_not_measured() -> None:
    with serving() as server:
        result = drive(server, Load(clients=1, limit=2, prompt=(8, 8), new=2), warmup=3)
    assert (len(server.seen), len(result.records)) == (5, 2)
    assert len({json.dumps(s.body["prompt"]) for s in server.seen}) == 5  # none is in a prefix cache already
    with serving(saying(500, b'"broken"')) as server, pytest.raises(InputError, match="the warm-up failed: HTTP 500"):
        drive(server, Load(clients=1, limit=2), warmup=1)


def test_cancelling_gives_what_there_is() -> None:
    """As Ctrl-C does: asyncio.run cancels its main task."""

    async def answer(reply: Reply) -> None:
        await (well(reply) if len(server.seen) <= 5 else asyncio.sleep(30))

    async def soon(target: Target, load: Load) -> Result:
        bodies = Bodies(Prompts(id_pieces(10, 1000), seed=0), "m")
        options: dict[str, Any] = {"endpoint": "/completions", "timeout": 60, "warmup": 0, "report": lambda *_: None}
        task = asyncio.create_task(run.drive(target, load, planned(Schedule(load)), bodies, **options))
        while len(server.seen) < 8:
            await asyncio.sleep(0.01)
        task.cancel()
        return await task

    with serving(answer) as server:
        result = asyncio.run(soon(parse_url(server.url), Load(rate=50.0, limit=1000, prompt=(2, 2), new=2)))
    figures = summary.summarise(result, {})
    assert figures["interrupted"]
    counts = figures["requests"]
    assert (counts["planned"], counts["completed"], counts["failed"]) == (1000, 5, 0)
    assert counts["unfinished"] == counts["sent"] - 5 >= 3
    assert figures["latency_ms"]["ttft"]["count"] == 5


# --- whom it speaks to


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("http://h/api/v3", "http://h:80/api/v3"),
        ("http://h/proxy", "http://h:80/proxy/v1"),
        ("https://h/v1beta", "https://h:443/v1beta"),
        ("http://[::1]:80", "http://[::1]:80/v1"),
    ],
)
def test_urls(url: str, seen: str) -> None:
    target = parse_url(url)
    assert target.url == seen
    assert (target.tls is not None) == url.startswith("https")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is no http or https URL"),
        ("ftp://h", "is no http or https URL"),
        ("http://", "is no http or https URL"),
        ("http://h:99999", "is no URL"),
        ("http://h:x", "is no URL"),
        ("http://[::1", "is no URL"),
        ("http://h/a b", "is no http or https URL"),
        ("http://h/ä", "is no http or https URL"),
        ("http://h?key=1", "holds more than host, port and path"),
        ("http://me:secret@h", "holds more than host, port and path"),
        ("http://h/v1/chat/completions", "names an endpoint"),
    ],
)
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_url(url)


@pytest.mark.parametrize("key", ["", "a b", "a\r\nX: y", "ä"])
def test_keys_that_no_header_holds(key: str) -> None:
    with pytest.raises(InputError, match="API key"):
        parse_url("http://h", key)


def test_the_key_is_sent_and_not_shown() -> None:
    with serving() as server:
        target = parse_url(server.url, "sk-secret")
        assert asyncio.run(client.first_model(target)) == "m"
    assert server.seen[0].headers["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in repr(target)


def test_nobody_to_speak_to() -> None:
    with serving() as server:
        target = parse_url(server.url)
        assert asyncio.run(client.locate(target)) == "127.0.0.1"
    with pytest.raises(InputError, match="nothing answers at http://127"):
        asyncio.run(client.locate(target))


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        ("401 No", b'{"error": {"message": "who are you"}}', "HTTP 401: who are you"),
        ("", b"", "disconnected: no answer"),
        ("", b"SSH-2.0-x\r\n", "malformed answer: no HTTP status line: SSH-2.0-x"),
        ("404 No", b"nothing here", "HTTP 404: nothing here"),
        ("200 OK", b"<html>", "its answer is not valid JSON: <html>"),
        ("200 OK", b'{"data": []}', "lists no model"),
        ("200 OK", b'{"data": [{"id": 3}, 4]}', "lists no model"),
        ("200 OK", b'{"data": "m"}', "lists no model"),
        ("200 OK", b"[" + b" " * (2 << 20), "its answer is not valid JSON"),
    ],
)
def test_servers_that_list_no_model(head: str, body: bytes, message: str) -> None:
    async def ask(target: Callable[[int], Target]) -> str:
        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body if head else body)
            writer.close()

        async with await asyncio.start_server(reply, "127.0.0.1", 0) as listening:
            return await client.first_model(target(listening.sockets[0].getsockname()[1]))

    with pytest.raises(InputError) as caught:
        asyncio.run(ask(lambda port: Target("127.0.0.1", port)))
    assert message in caught.value.message
    hint = "--api-key-env" if head.startswith("401") else "http or https?" if head == "" else "--model NAME"
    assert hint in str(caught.value.hint)
