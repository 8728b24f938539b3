"""HTTP answers, server-sent events and chunks: equal to other readers of the formats, however the bytes are cut."""

from __future__ import annotations

import http.client
import io
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.bench.load import answer
from hasten.bench.load import http as ours
from hasten.bench.load.answer import Usage
from hasten.bench.load.http import AnswerError, Response, shown
from hasten.bench.load.sse import Events


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except AnswerError as error:
        return str(error)
    return ""


# --- HTTP


def fed(data: bytes, cuts: list[int], end: bool = True) -> tuple[Response, bytes]:
    response, body, last = Response(), b"", 0
    for cut in [*sorted(c % (len(data) + 1) for c in cuts), len(data)]:
        body += response.feed(data[last:cut])
        last = cut
    if end and not response.complete:
        response.end()
    return response, body


def standard_library(data: bytes) -> tuple[int, bytes]:
    class Socket:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(data)

    response = http.client.HTTPResponse(cast(Any, Socket()))
    response.begin()
    return response.status, response.read()


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%X;a=b\r\n%s\r\n" % (len(p), p) for p in parts if p) + b"0\r\nTrailer: x\r\n\r\n"


PIECES = st.lists(st.binary(max_size=40), max_size=6)
CUTS = st.lists(st.integers(0, 1 << 16), max_size=8)


@settings(deadline=None)
@given(PIECES, CUTS, st.sampled_from(["chunked", "sized", "close"]), st.integers(200, 599), st.booleans())
def test_answers_equal_the_standard_library_s(
    parts: list[bytes], cuts: list[int], kind: str, status: int, early: bool
) -> None:
    whole = b"".join(parts)
    if status in (204, 304):  # without a body, whatever its headers say, which http.client does not know
        parts, whole, kind = [], b"", "close"
    headers = {
        "chunked": b"Transfer-Encoding: chunked\r\n",
        "sized": b"Content-Length: %d\r\n" % len(whole),
        "close": b"",
    }[kind]
    head = b"HTTP/1.1 %d All Right\r\nX-Two:  a b \r\n%s\r\n" % (status, headers)
    start = b"HTTP/1.1 100 Continue\r\n\r\n" if early else b""
    body = chunked(parts) if kind == "chunked" else whole
    response, found = fed(start + head + body, cuts)
    assert (response.status, found) == (status, whole) == standard_library(start + head + body)
    assert response.complete
    assert response.headers["x-two"] == "a b"


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no answer"),
        (b"SSH-2.0-OpenSSH_9\r\n", "no HTTP status line: SSH-2.0-OpenSSH_9"),
        (b"HTTP/1.1 999 X\r\n", "no HTTP status line"),
        (b"HTTP/2 200\r\n", "no HTTP status line"),
        (OK, "the connection closed within the answer"),
        (OK + b"no colon\r\n", "no HTTP header: no colon"),
        (OK + b"a: b\r\n c: d\r\n", "no HTTP header: c: d"),
        (OK + b"a b: c\r\n", "no HTTP header"),
        (OK + b"Content-Length: 5\r\n\r\nabc", "the connection closed within the answer"),
        (OK + b"Content-Length: -5\r\n\r\n", "content-length is -5"),
        (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", "two different content-length headers"),
        (OK + b"Content-Encoding: gzip\r\n\r\n", "content-encoding gzip was not asked for"),
        (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "transfer-encoding is gzip, chunked"),
        (CHUNKED + b"zz\r\n", "no chunk size: zz"),
        (CHUNKED + b"-5\r\n", "no chunk size: -5"),
        (CHUNKED + b"fffffffff\r\n", "no chunk size"),
        (CHUNKED + b"2\r\nabcd\r\n", "a chunk goes on beyond its size: cd"),
        (CHUNKED + b"5\r\nabc", "the connection closed within the answer"),
        (CHUNKED + b"3\r\nabc\r\n", "the connection closed within the answer"),
        (CHUNKED + b"1" * 5000, "a chunk's size longer than 1024 bytes"),
        (CHUNKED + b"0\r\n" + b"a: b\r\n" * 1000, "more than 128 trailers"),
        (b"H" * 100_000, "a header line longer than 65536 bytes"),
        (OK + b"a: b\r\n" * 1000, "more than 128 headers"),
        (OK + b"".join(b"a%d: %s\r\n" % (i, b"x" * 5000) for i in range(20)), "more than 128 headers or 65536 bytes"),
        (b"HTTP/1.1 100 Go On\r\n\r\n" * 1000, "more than 128 headers"),
    ],
)
@pytest.mark.parametrize("cuts", [[], list(range(0, 3000, 7))])
def test_wrong_answers(data: bytes, message: str, cuts: list[int]) -> None:
    with pytest.raises(AnswerError) as caught:
        fed(data, cuts)
    assert message in str(caught.value)


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_never_has_a_body(status: int) -> None:
    response, body = fed(b"HTTP/1.1 %d Nothing\r\nTransfer-Encoding: chunked\r\n\r\n" % status, [], end=False)
    assert response.complete
    assert body == b""


def test_an_endless_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "ANSWER_BYTES", 10_000)
    with pytest.raises(AnswerError, match="the answer is longer than"):
        fed(OK + b"\r\n" + b"x" * 20_000, list(range(0, 20_000, 1000)))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"", OK, CHUNKED, CHUNKED + b"2\r\n"]), st.binary(max_size=100), CUTS)
def test_no_bytes_do_more_than_be_refused(start: bytes, noise: bytes, cuts: list[int]) -> None:
    assert refusal(lambda: fed(start + noise, cuts)).isprintable()


# --- server-sent events


def events(data: bytes, cuts: list[int]) -> list[bytes]:
    parser, found, last = Events(), list[bytes](), 0
    for cut in [*sorted(c % (len(data) + 1) for c in cuts), len(data)]:
        found += parser.feed(data[last:cut])
        last = cut
    return found


def by_the_book(data: bytes) -> list[bytes]:
    """The same format, read whole: lines first, then events."""
    text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found: list[bytes] = []
    held: list[str] = []
    for line in text.split("\n")[:-1]:
        if line == "":
            found += ["\n".join(held).encode()] if held else []
            held = []
        elif line == "data" or line.startswith("data:"):
            held.append(line[5:].removeprefix(" "))
    return found


LINES = st.lists(
    st.sampled_from(["data: {}", "data:", "data", "data:  two", "event: x", ": ping", "", "", "id: 3", "dat: a", "é"]),
    max_size=20,
)


@settings(deadline=None, max_examples=500)
@given(LINES, st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=20, max_size=20), CUTS, st.booleans())
def test_events_are_by_the_book(lines: list[str], endings: list[str], cuts: list[int], mark: bool) -> None:
    text = "".join(line + ending for line, ending in zip(lines, endings, strict=False))
    data = ("\ufeff" if mark else "").encode() + text.encode()
    assert events(data, cuts) == by_the_book(data)


def test_an_event_is_there_with_its_last_byte() -> None:
    for ending in (b"\n", b"\r\n", b"\r"):
        parser = Events()
        assert parser.feed(b"data: 1" + ending) == []
        assert parser.feed(ending) == [b"1"]
        assert parser.feed(b"data: 2" + ending + ending) == [b"2"]


def test_what_is_unfinished_is_dropped() -> None:
    assert events(b"data: 1\n\ndata: 2\n", []) == [b"1"]


@pytest.mark.parametrize(
    "data", [b"data: " + b"x" * (2 << 20), b"x" * (2 << 20) + b"\n", b"data: %s\n" % (b"y" * 1000) * 5000]
)
def test_overlong_lines_and_events(data: bytes) -> None:
    with pytest.raises(AnswerError, match="longer than"):
        events(data, list(range(0, len(data), 60_000)))


# --- chunks


def test_which_chunks_are_output() -> None:
    def output(**choice: Any) -> bool:
        return answer.parse(json.dumps({"choices": [{"index": 0, **choice}]}).encode()).output

    assert output(text="x")
    assert not output(text="")
    assert not output(text="", finish_reason="stop")
    assert output(delta={"content": "x"})
    assert output(delta={"reasoning_content": "x"})
    assert output(delta={"reasoning": "x", "content": None})
    assert output(delta={"tool_calls": [{"index": 0}]})
    assert not output(delta={"role": "assistant", "content": ""})
    assert not output(delta={}, finish_reason="length")
    assert not answer.parse(b'{"choices": []}').output


def test_usage_and_finish() -> None:
    found = answer.parse(
        b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13,'
        b' "prompt_tokens_details": {"cached_tokens": 3}}, "error": null}'
    )
    assert found.usage == Usage(9, 4, 3)
    assert answer.parse(b'{"choices": [{"text": "a", "finish_reason": "stop"}], "usage": null}').finish_reason == "stop"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "an event is not valid JSON: {"),
        (b"\xff", "an event is not valid JSON"),
        (b"[" * 100_000, "an event is not valid JSON"),
        (b"[1]", "an event is a list, must be an object"),
        (b"{}", "choices is null or missing, must be a list of objects"),
        (b'{"choices": {}}', "choices is an object"),
        (b'{"choices": [3]}', "choices is a list, must be a list of objects"),
        (b'{"choices": [{"text": 3}]}', "text is a number, must be a string"),
        (b'{"choices": [{"delta": "x"}]}', "delta is a string, must be an object"),
        (b'{"choices": [{"delta": {"content": ["x"]}}]}', "content is a list"),
        (b'{"choices": [{"delta": {"content": "x", "reasoning": 5}}]}', "reasoning is a number"),
        (b'{"choices": [{"text": "", "finish_reason": 3}]}', "finish_reason is a number"),
        (b'{"choices": [], "usage": 3}', "usage is a number"),
        (b'{"choices": [], "usage": {}}', "usage.prompt_tokens is None"),
        (b'{"choices": [], "usage": {"prompt_tokens": -1}}', "usage.prompt_tokens is -1"),
        (b'{"choices": [], "usage": {"prompt_tokens": 1.5}}', "usage.prompt_tokens is 1.5"),
        (b'{"choices": [], "usage": {"prompt_tokens": true}}', "usage.prompt_tokens is True"),
        (b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1e999}}', "completion_tokens is inf"),
        (b'{"error": {"message": "no\\u001b[31mmore", "code": 5}}', "an error within the stream: no [31mmore"),
        (b'{"error": "all is lost"}', "an error within the stream: all is lost"),
    ],
)
def test_wrong_chunks(data: bytes, message: str) -> None:
    with pytest.raises(AnswerError) as caught:
        answer.parse(data)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "text", "delta", "content", "usage", "error", "message"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_no_json_does_more_than_be_refused(value: Any) -> None:
    assert refusal(lambda: answer.parse(json.dumps(value).encode())).isprintable()


def test_what_a_server_says_is_one_harmless_line() -> None:
    assert shown(b"a\x1b[2Jb\r\n\tc\xff\xe2\x80\xae") == "a [2Jb c\ufffd"
    assert len(shown("x" * 10_000)) == 80
