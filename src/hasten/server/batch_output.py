"""The answers of a batch on disk: each is there as soon as it is made, and after any end the rest can follow.

While a batch runs, OUT.partial holds whole lines, and OUT.partial.json says of what; the latter is also what is locked.
A line's id is made of both, so that a file proves by itself whose answers it holds. With the last line OUT.partial
becomes OUT. Answers that an engine's fault made (status 500 and above) stand at the end of the file, and are cut off
and made again when the same batch is run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hasten.checkpoint import files
from hasten.errors import OutputError
from hasten.server.batch_input import Requests
from hasten.server.streams import encoded

try:
    import fcntl
except ImportError:  # Windows: two runs on one output are not kept apart there
    fcntl = None  # type: ignore[assignment]

SYNC_SECONDS = 5.0
FAULT = 500
"""Statuses from here on are the engine's fault, not the request's."""
HEADER_BYTES = 1 << 16
ANEW = "give --restart to begin anew"


@dataclass(frozen=True)
class Summary:
    lines: int
    answered: int
    """Of them in this run; the others were there already."""
    statuses: dict[int, int]
    """Lines by their status, those of earlier runs included, as are tokens."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """Of this run, as is the speed."""
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class _Answer:
    index: int
    status: int
    usage: dict[str, Any]
    end: int
    """Where its line ends in the file."""


class Results:
    """The answers to `requests`; a context manager, which holds the lock.

    `facts`: what decides the answers, by names that a message can show. `restart`: what an earlier run left is dropped.
    Raises OutputError where the output cannot be written, is being written, or belongs to another batch.
    """

    def __init__(self, output: Path, requests: Requests, facts: dict[str, Any], restart: bool = False) -> None:
        self.output = Path(os.path.realpath(output)) if output.is_symlink() else output
        self.partial, self.header = work_files(self.output)
        self.done = np.zeros(len(requests), np.bool_)  # [requests]
        self.statuses: Counter[int] = Counter()
        self.prompt_tokens = self.completion_tokens = 0
        self.complete = False
        self._requests, self._restart = requests, restart
        self._facts = {"input": requests.sha256, **facts}
        self._key = json.dumps(self._facts, sort_keys=True)
        self._lock = self._file = -1
        self._size, self._synced = 0, time.monotonic()

    @property
    def count(self) -> int:
        return self.statuses.total()

    def id(self, custom_id: str) -> str:
        return f"batch_req_{hashlib.sha256(f'{self._key} {custom_id}'.encode()).hexdigest()[:32]}"

    def add(self, index: int, custom_id: str, status: int, request_id: str, body: Any) -> None:
        """Write one answer: all of its line, or none and an OutputError."""
        response = {"status_code": status, "request_id": request_id, "body": body}
        line = {"id": self.id(custom_id), "custom_id": custom_id, "response": response, "error": None}
        self._write(encoded(line) + b"\n")
        self._note(_Answer(index, status, _usage(body), self._size))

    def finish(self) -> None:
        """Every request has its answer: the output takes its name."""
        assert self.done.all(), "requests without an answer"
        with self._explained(self.output):
            os.fsync(self._file)
            os.replace(self.partial, self.output)
            _sync_folder(self.output.parent)
        self.complete = True

    def summary(self, lines_before: int, tokens_before: int, seconds: float) -> Summary:
        """What there is, for a run that found so many answers and written tokens already there."""
        new = self.completion_tokens - tokens_before
        return Summary(
            self.count,
            self.count - lines_before,
            dict(sorted(self.statuses.items())),
            self.prompt_tokens,
            self.completion_tokens,
            seconds,
            new / seconds if seconds else 0.0,
        )

    def __enter__(self) -> Results:
        with self._explained(self.header):
            self._lock = _locked(self.header, self.output)
        try:
            with self._explained(self.partial):
                self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._file)
        self._close()

    def _open(self) -> None:
        if self._restart:
            self.partial.unlink(missing_ok=True)
            os.ftruncate(self._lock, 0)
        elif self.output.exists() and self._whole():
            return
        self._check_header()
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        for answer in self._answers(self.partial):
            if answer.status >= FAULT:
                break
            self._note(answer)
            self._size = answer.end
        os.ftruncate(self._file, self._size)

    def _whole(self) -> bool:
        """Whether the output there is already all that is wanted; where it ends in faults, it becomes the partial."""
        found = list(dict.fromkeys(self._statuses_of(self.output)))
        if self.count < len(self._requests) or self.output.stat().st_size != self._size:
            raise OutputError(
                f"{self.output} exists, and is not the whole answer to {self._requests.path} by this model",
                "choose another output, or give --restart to replace it",
            )
        if max(found) < FAULT:
            self.complete = True
            return True
        self._forget()
        os.replace(self.output, self.partial)
        self._write_header()
        return False

    def _statuses_of(self, path: Path) -> Iterator[int]:
        for answer in self._answers(path):
            self._note(answer)
            self._size = answer.end
            yield answer.status

    def _forget(self) -> None:
        self.done[:] = False
        self.statuses.clear()
        self.prompt_tokens = self.completion_tokens = self._size = 0

    def _note(self, answer: _Answer) -> None:
        self.done[answer.index] = True
        self.statuses[answer.status] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            value = answer.usage.get(name)
            setattr(self, name, getattr(self, name) + (value if isinstance(value, int) else 0))

    def _answers(self, path: Path) -> Iterator[_Answer]:
        """Those of this batch, up to the first line that is none, is there for the second time, or is torn."""
        end = 0
        with open(path, "rb") as file:
            for raw in file:
                end += len(raw)
                answer = self._read(raw, end)
                if answer is None or self.done[answer.index]:
                    return
                yield answer

    def _read(self, raw: bytes, end: int) -> _Answer | None:
        if not raw.endswith(b"\n"):
            return None
        try:
            line = json.loads(raw)
            custom_id, response = line["custom_id"], line["response"]
            index = self._requests.index(custom_id) if line["id"] == self.id(custom_id) else None
            status, usage = int(response["status_code"]), _usage(response["body"])
            return None if index is None else _Answer(index, status, usage, end)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _check_header(self) -> None:
        if not (self.partial.exists() and self.partial.stat().st_size):
            self._write_header()
            return
        try:
            before = json.loads(os.pread(self._lock, HEADER_BYTES, 0))
            differing = [name for name in self._facts if before.get(name) != self._facts[name]]
        except (ValueError, AttributeError):
            raise OutputError(f"{self.partial} is there, but {self.header} does not say of what", ANEW) from None
        if differing:
            raise OutputError(
                f"{self.partial} was begun with another {' and another '.join(differing)}",
                f"give what it was begun with, or {ANEW}",
            )

    def _write_header(self) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, (json.dumps(self._facts, indent=1) + "\n").encode(), 0)
        os.fsync(self._lock)

    def _write(self, data: bytes) -> None:
        with self._explained(self.partial):
            left = memoryview(data)
            try:
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
            self._size += len(data)
            now = time.monotonic()
            if now - self._synced >= SYNC_SECONDS:
                self._synced = now
                os.fsync(self._file)

    def _close(self) -> None:
        """Give the lock back; where nothing was answered, nothing is left."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                begun = self.partial.exists() and self.partial.stat().st_size > 0
                if not begun:
                    self.partial.unlink(missing_ok=True)
                    self.header.unlink(missing_ok=True)
        for handle in (self._file, self._lock):
            if handle >= 0:
                os.close(handle)
        self._file = self._lock = -1

    @contextlib.contextmanager
    def _explained(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"{self.count} of {len(self.done)} answers are kept; when that is mended, the same command continues"
            raise OutputError(f"cannot write {path}: {error.strerror or error}", kept if self.count else None) from None


def check_paths(path: Path, output: Path) -> None:
    """Raise OutputError where `output` cannot be written, or writing it would write over the input at `path`."""
    files.writable(output)
    real = Path(os.path.realpath(output))
    for other in (real, *work_files(real)):
        if other.exists() and path.exists() and os.path.samefile(other, path):
            raise OutputError(f"{other} is the input: it would be written over", "choose another output")


def work_files(output: Path) -> tuple[Path, Path]:
    """Where the answers are until all are there, and what says of what they are."""
    partial = output.with_name(output.name + ".partial")
    return partial, partial.with_name(partial.name + ".json")


def _usage(body: Any) -> dict[str, Any]:
    usage = body.get("usage") if isinstance(body, dict) else None
    return usage if isinstance(usage, dict) else {}


def _locked(path: Path, output: Path) -> int:
    """The file, open and locked. A run that ends takes the name away, so what was locked must still have it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(handle)
            raise OutputError(f"another run is writing {output}", "wait for it, or choose another output") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
