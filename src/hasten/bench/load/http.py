"""An HTTP/1.1 answer, read from whatever pieces the network brings (RFC 9112): no sockets, bounded everywhere.

Why not a library: an answer's times are wanted at the moment its bytes arrive, at a cost that a server on the same two
cores does not feel. httpx goes through three layers of coroutines for each chunk of a stream.
"""

from __future__ import annotations

import re
from enum import Enum, auto

HEAD_BYTES = 64 << 10
MOST_HEADERS = 128
CHUNK_LINE_BYTES = 1 << 10
ANSWER_BYTES = 256 << 20
STATUS = re.compile(rb"HTTP/1\.[01] ([1-5]\d\d)(?: .*)?")
NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
LENGTH = re.compile(r"\d{1,15}", re.ASCII)
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.*)?")


class AnswerError(Exception):
    """A server's answer breaks the protocol. Its text goes into the request's record."""


class State(Enum):
    STATUS = auto()
    HEADERS = auto()
    SIZED = auto()
    CHUNK_SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILERS = auto()
    UNTIL_CLOSE = auto()
    COMPLETE = auto()


class Response:
    """`feed` takes bytes as they come and returns what of the body they complete; `end` says the connection closed.

    Both raise AnswerError.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._state = State.STATUS
        self._buffer = bytearray()
        self._left = 0  # bytes of the body or chunk still to come
        self._head = self._received = self._lines = 0

    @property
    def begun(self) -> bool:
        """The status and the headers are here."""
        return self._state not in (State.STATUS, State.HEADERS)

    @property
    def complete(self) -> bool:
        return self._state is State.COMPLETE

    def feed(self, data: bytes) -> bytes:
        self._received += len(data)
        if self._received > ANSWER_BYTES:
            raise AnswerError(f"the answer is longer than {ANSWER_BYTES >> 20} MiB")
        self._buffer += data
        body = bytearray()
        while self._step(body):
            pass
        return bytes(body)

    def end(self) -> None:
        if self._state is State.UNTIL_CLOSE:
            self._state = State.COMPLETE
        if self._state is not State.COMPLETE:
            raise AnswerError("the connection closed within the answer" if self._received else "no answer")

    def _step(self, body: bytearray) -> bool:
        """One step of the state machine; False where it needs more bytes."""
        match self._state:
            case State.STATUS | State.HEADERS:
                return self._head_line()
            case State.SIZED | State.CHUNK | State.UNTIL_CLOSE:
                return self._take(body)
            case State.CHUNK_SIZE:
                return self._chunk_size()
            case State.CHUNK_END:
                return self._chunk_end()
            case State.TRAILERS:
                return self._trailer()
            case State.COMPLETE:
                return False

    def _line(self, limit: int, what: str) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end > limit or (end < 0 and len(self._buffer) > limit):
            raise AnswerError(f"{what} longer than {limit} bytes")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line.removesuffix(b"\r")

    def _head_line(self) -> bool:
        line = self._line(HEAD_BYTES, "a header line")
        if line is None:
            return False
        self._head += len(line)
        self._lines += 1
        if self._head > HEAD_BYTES or self._lines > MOST_HEADERS:
            raise AnswerError(f"more than {MOST_HEADERS} headers or {HEAD_BYTES} bytes of them")
        if self._state is State.STATUS:
            found = STATUS.fullmatch(line)
            if not found:
                raise AnswerError(f"no HTTP status line: {shown(line)}")
            self.status = int(found[1])
            self._state = State.HEADERS
        elif line:
            self._header(line)
        else:
            self._begin_body()
        return True

    def _header(self, line: bytes) -> None:
        name, colon, value = line.partition(b":")
        if not colon or not NAME.fullmatch(name):
            raise AnswerError(f"no HTTP header: {shown(line)}")
        key, text = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        if key in ("content-length", "transfer-encoding") and self.headers.get(key, text) != text:
            raise AnswerError(f"two different {key} headers")
        self.headers[key] = text

    def _begin_body(self) -> None:
        if self.status < 200:  # 100 Continue, 103 Early Hints: the answer itself follows
            self.headers.clear()
            self._state = State.STATUS
            return
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise AnswerError(f"content-encoding {shown(encoding)} was not asked for")
        transfer, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if transfer is not None and transfer.lower() != "chunked":
            raise AnswerError(f"transfer-encoding is {shown(transfer)}, not chunked")
        if length is not None and not LENGTH.fullmatch(length):
            raise AnswerError(f"content-length is {shown(length)}")
        if self.status in (204, 304):
            self._state = State.COMPLETE
        elif transfer is not None:
            self._state = State.CHUNK_SIZE
        elif length is not None:
            self._left = int(length)
            self._state = State.SIZED if self._left else State.COMPLETE
        else:
            self._state = State.UNTIL_CLOSE

    def _take(self, body: bytearray) -> bool:
        count = len(self._buffer) if self._state is State.UNTIL_CLOSE else min(self._left, len(self._buffer))
        body += self._buffer[:count]
        del self._buffer[:count]
        if self._state is State.UNTIL_CLOSE:
            return False
        self._left -= count
        if self._left:
            return False
        self._state = State.COMPLETE if self._state is State.SIZED else State.CHUNK_END
        return True

    def _chunk_size(self) -> bool:
        line = self._line(CHUNK_LINE_BYTES, "a chunk's size")
        if line is None:
            return False
        found = CHUNK_SIZE.fullmatch(line)
        if not found:
            raise AnswerError(f"no chunk size: {shown(line)}")
        self._left = int(found[1], 16)
        self._state = State.CHUNK if self._left else State.TRAILERS
        return True

    def _chunk_end(self) -> bool:
        line = self._line(CHUNK_LINE_BYTES, "a chunk's end")
        if line is None:
            return False
        if line:
            raise AnswerError(f"a chunk goes on beyond its size: {shown(line)}")
        self._state = State.CHUNK_SIZE
        return True

    def _trailer(self) -> bool:
        line = self._line(HEAD_BYTES, "a trailer")
        if line is None:
            return False
        self._lines += 1
        if self._lines > 2 * MOST_HEADERS:
            raise AnswerError(f"more than {MOST_HEADERS} trailers")
        if not line:
            self._state = State.COMPLETE
        return True


def shown(value: bytes | str, most: int = 80) -> str:
    """What a server said, as one short line that no terminal obeys."""
    text = value[: 4 * most].decode("utf-8", "replace") if isinstance(value, bytes) else value[: 4 * most]
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= most else text[: most - 3] + "..."
