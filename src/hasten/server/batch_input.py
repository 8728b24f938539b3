"""The file of a batch: read line by line and checked as a whole before anything is loaded.

Format: OpenAI's batch input (platform.openai.com/docs/api-reference/batch/request-input).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.checkpoint.files import regular_size
from hasten.errors import CheckpointError, InputError
from hasten.server.protocol import no_constant

Report = Callable[[str, int, int], None]
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
FIELDS = ("custom_id", "method", "url", "body")
LINE_BYTES = 16 << 20
"""Of one line: a body as large as the server takes one, and as much again for the way it may be written."""
ID_CHARACTERS = 512
DEPTH = 200
"""Of objects and lists in each other: what Python parses here it must also parse deep inside the server."""
REPORT_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Line:
    """One request of the file. `index` counts requests from 0, `number` lines from 1, `offset` bytes."""

    index: int
    number: int
    offset: int
    custom_id: str
    url: str
    body: dict[str, Any]


class Requests:
    """A file that was found to be right. Memory: 40 bytes a request, however long its lines are."""

    def __init__(self, path: Path, names: Collection[str], report: Report | None = None) -> None:
        """Read all of `path`; `names` are those that a body may give as its model.

        Raises InputError that names the file, the line and what is wrong with it.
        """
        self.path = path
        self.names = tuple(names)
        size, digests = _size(path), bytearray()
        hashed, told = hashlib.sha256(), 0
        for line in self._lines(hashed.update):
            digests += digest(line.custom_id)
            if report and line.offset - told >= REPORT_BYTES:
                told = line.offset
                report("checking the input (MB)", line.offset >> 20, max(size >> 20, 1))
        self.sha256 = hashed.hexdigest()
        self.ids: npt.NDArray[np.bytes_] = np.frombuffer(digests, "S16")  # [requests], in the file's order
        if not len(self.ids):
            raise InputError(f"{path} holds no request", "give one JSON object a line")
        self._order = np.argsort(self.ids, kind="stable")  # [requests]
        self._check_unique()

    def __len__(self) -> int:
        return len(self.ids)

    def index(self, custom_id: str) -> int | None:
        """Which request has this id."""
        wanted = np.frombuffer(digest(custom_id), "S16")
        place = int(np.searchsorted(self.ids, wanted, sorter=self._order)[0])
        found = int(self._order[place]) if place < len(self) else -1
        return found if found >= 0 and self.ids[found] == wanted[0] else None

    def read(self, done: npt.NDArray[np.bool_]) -> Iterator[Line]:
        """The requests that are not `done` [requests]. Raises InputError where the file is not what was checked."""
        hashed = hashlib.sha256()
        for line in self._lines(hashed.update, done):
            if line.index >= len(self) or self.ids[line.index] != digest(line.custom_id).rstrip(b"\0"):
                raise self._changed()
            yield line
        if hashed.hexdigest() != self.sha256:
            raise self._changed()

    def again(self, line: Line) -> Line:
        """`line`, read anew where its body was not kept."""
        with _open(self.path) as file:
            file.seek(line.offset)
            found = self._parsed(file.readline(LINE_BYTES + 1), line.index, line.number, line.offset)
        if found.custom_id != line.custom_id:
            raise self._changed()
        return found

    def _changed(self) -> InputError:
        return InputError(
            f"{self.path} was changed while it was answered", "put back what it held, or give --restart to begin anew"
        )

    def _lines(self, update: Callable[[bytes], None], done: npt.NDArray[np.bool_] | None = None) -> Iterator[Line]:
        index = offset = number = 0
        with _open(self.path) as file:
            while raw := file.readline(LINE_BYTES + 1):
                number += 1
                if len(raw) > LINE_BYTES:
                    raise self._wrong(number, f"is longer than {LINE_BYTES} bytes")
                update(raw)
                if raw.strip() and raw.strip() != codecs.BOM_UTF8:
                    if done is None or index >= len(done) or not done[index]:
                        yield self._parsed(raw, index, number, offset)
                    index += 1
                offset += len(raw)

    def _parsed(self, raw: bytes, index: int, number: int, offset: int) -> Line:
        try:
            made = json.loads(raw.removeprefix(codecs.BOM_UTF8).decode(), parse_constant=no_constant)
        except UnicodeDecodeError as error:
            raise self._wrong(number, f"is not UTF-8 text (byte {error.start + 1})") from None
        except RecursionError:
            raise self._wrong(number, "is nested too deeply") from None
        except ValueError as error:
            raise self._wrong(number, f"is not JSON: {_shown(str(error))}") from None
        if not isinstance(made, dict):
            raise self._wrong(number, f"is a JSON {_kind(made)}, must be an object")
        if raw.count(b"{") + raw.count(b"[") > DEPTH and _depth(made) > DEPTH:
            raise self._wrong(number, "is nested too deeply")
        unknown = next((name for name in made if name not in FIELDS), None)
        if unknown is not None:
            raise self._wrong(number, f"has an unknown field '{_shown(unknown)}'; known: {', '.join(FIELDS)}")
        missing = next((name for name in FIELDS if name not in made), None)
        if missing is not None:
            raise self._wrong(number, f"has no {missing}")
        self._check_fields(number, **made)
        return Line(index, number, offset, made["custom_id"], made["url"], made["body"])

    def _check_fields(self, number: int, custom_id: object, method: object, url: object, body: object) -> None:
        if not isinstance(custom_id, str) or not custom_id or len(custom_id) > ID_CHARACTERS or not _encodes(custom_id):
            raise self._wrong(number, f"has a custom_id that is no text of 1 to {ID_CHARACTERS} characters")
        if method != "POST":
            raise self._wrong(number, f"has the method {_shown(repr(method))}, must be 'POST'")
        if url not in URLS:
            raise self._wrong(number, f"has the url {_shown(repr(url))}; known: {', '.join(URLS)}")
        if not isinstance(body, dict):
            raise self._wrong(number, f"has a body that is a JSON {_kind(body)}, must be an object")
        model = body.get("model")
        if isinstance(model, str) and model not in self.names:
            raise self._wrong(
                number,
                f"asks for the model '{_shown(model)}'; this batch is answered by {' or '.join(self.names)}",
                "--name gives the model the name that the file has for it",
            )

    def _check_unique(self) -> None:
        same = self.ids[self._order][1:] == self.ids[self._order][:-1]
        if not same.any():
            return
        pairs = np.stack([self._order[:-1][same], self._order[1:][same]])  # [2, repeated]
        first, second = (int(i) for i in pairs[:, np.argmin(pairs[1])])
        keep = np.ones(len(self), np.bool_)
        keep[[first, second]] = False
        a, b = self._lines(lambda raw: None, keep)
        raise self._wrong(b.number, f"has the custom_id '{_shown(b.custom_id)}', which line {a.number} has already")

    def _wrong(self, number: int, what: str, hint: str | None = None) -> InputError:
        return InputError(f"{self.path}: line {number} {what}", hint)


def digest(custom_id: str) -> bytes:
    """16 bytes that stand for an id."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def _size(path: Path) -> int:
    try:
        return regular_size(path)
    except CheckpointError as error:
        raise InputError(error.message, "a batch is read twice, from a file") from None


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _depth(value: object) -> int:
    """Of nesting, counted without recursion and no further than is allowed."""
    level, depth = [value], 0
    while level and depth <= DEPTH:
        depth += 1
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return depth


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _kind(value: object) -> str:
    kinds = {type(None): "null", bool: "truth value", int: "number", float: "number", str: "text", list: "list"}
    return kinds.get(type(value), "object")


def _shown(text: str) -> str:
    """Of foreign text, as much as a message may carry, and nothing that a terminal obeys."""
    plain = "".join(c if c.isprintable() else "?" for c in text[:81])
    return plain if len(plain) <= 80 else plain[:77] + "..."
