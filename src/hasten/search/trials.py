"""What has been measured so far, in a folder beside the output, so that an interrupted search continues."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from hasten.errors import OutputError

Json = Any


def digest(value: Json) -> str:
    """Short hash of anything JSON can say, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


class Trials:
    """Measurements by key in `folder`/trials.sqlite; each is on disk as soon as it is made.

    A context manager: closes the file, and on a clean end removes the folder unless `keep`. Only one process may hold
    a folder. Raises OutputError where the folder cannot be made, read, locked or written.
    """

    def __init__(self, folder: Path, keep: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.reused = 0
        self.made = 0
        path = folder / "trials.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, isolation_level=None, timeout=0.2)
            self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
            # A killed process loses nothing; a machine that loses power may lose the last measurements, never the file.
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS trials (kind TEXT, key TEXT, value TEXT, PRIMARY KEY (kind, key))"
            )
            self._base.execute("BEGIN EXCLUSIVE")  # takes the lock now, and holds it until closed
            self._base.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise _explain(path, error) from None

    def get(self, kind: str, key: Json) -> Json | None:
        try:
            row = self._base.execute(
                "SELECT value FROM trials WHERE kind = ? AND key = ?", (kind, digest(key))
            ).fetchone()
        except sqlite3.Error as error:
            raise _explain(self.folder, error) from None
        return None if row is None else json.loads(row[0])

    def put(self, kind: str, key: Json, value: Json) -> None:
        """Infinity is a value: what a broken candidate loses."""
        try:
            row = (kind, digest(key), json.dumps(value))
            self._base.execute("INSERT OR REPLACE INTO trials VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            raise _explain(self.folder, error) from None

    def measure(self, kind: str, key: Json, make: Callable[[], Json]) -> Json:
        """The stored measurement, or `make()`, stored."""
        found = self.get(kind, key)
        if found is not None:
            self.reused += 1
            return found
        value = make()
        self.put(kind, key, value)
        self.made += 1
        return value

    def count(self) -> int:
        """Measurements kept."""
        return int(self._base.execute("SELECT COUNT(*) FROM trials").fetchone()[0])

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._base.close()
        if kind is None and not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def _explain(path: Path, error: Exception) -> OutputError:
    text = str(error)
    if "locked" in text:
        return OutputError(f"another run is using {path}", "wait for it, or choose another output")
    if "malformed" in text or "not a database" in text:
        return OutputError(f"{path} is damaged: {text}", "delete that folder and start again")
    return OutputError(f"cannot keep measurements in {path}: {text}", "is the disk full, or the folder not writable?")
