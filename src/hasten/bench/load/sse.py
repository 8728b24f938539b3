"""Server-sent events, read from whatever pieces the network brings.

The format is https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6: lines end with LF, CR LF or
CR; a blank line sends the event; lines with a colon first are comments; what is unfinished at the end is dropped.
"""

from __future__ import annotations

import re

from hasten.bench.load.http import AnswerError

LINE_BYTES = 1 << 20
EVENT_BYTES = 4 << 20
ENDING = re.compile(rb"\r\n|\n|\r")


class Events:
    """`feed` returns the data of the events that the bytes complete. Raises AnswerError at overlong ones."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0  # where in the buffer a line's end may still be
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False  # the last line ended with CR at the end of its piece: a LF may belong to it
        self._first = True

    def feed(self, data: bytes) -> list[bytes]:
        if self._after_cr and data:
            data = data.removeprefix(b"\n")
            self._after_cr = False
        self._buffer += data
        found: list[bytes] = []
        start = 0
        for ending in ENDING.finditer(self._buffer, self._scanned):
            self._line(bytes(self._buffer[start : ending.start()]), found)
            start = ending.end()
            self._after_cr = ending[0] == b"\r" and start == len(self._buffer)
        del self._buffer[:start]
        self._scanned = len(self._buffer)
        if self._scanned > LINE_BYTES:
            raise AnswerError(f"a line of the stream is longer than {LINE_BYTES >> 10} KiB")
        return found

    def _line(self, line: bytes, found: list[bytes]) -> None:
        if self._first:
            line = line.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        if len(line) > LINE_BYTES:
            raise AnswerError(f"a line of the stream is longer than {LINE_BYTES >> 10} KiB")
        if not line:
            if self._data:
                found.append(b"\n".join(self._data))
            self._data, self._size = [], 0
            return
        name, _, value = line.partition(b":")
        if name != b"data":
            return  # event, id, retry and comments say nothing about tokens
        value = value.removeprefix(b" ")
        self._size += len(value) + 1
        if self._size > EVENT_BYTES:
            raise AnswerError(f"an event of the stream is longer than {EVENT_BYTES >> 20} MiB")
        self._data.append(value)
