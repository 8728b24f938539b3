"""What searches have measured, kept for good in the user's cache: whole candidates, their losses, speeds and recipes.

A run enters when it is over, in one transaction; one that is interrupted and goes on keeps its name, so it enters once.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from hasten.backends.host import cache_folder
from hasten.checkpoint.write import made_by
from hasten.compress.recipe import Choice
from hasten.errors import InputError, OutputError
from hasten.search import trials

Json = dict[str, Any]
SCHEMA = 1
"""Of the file: one from a later version is refused, not misread."""
WAIT_SECONDS = 20.0
"""For another process that is writing."""
TABLES = """
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY, at TEXT NOT NULL, model TEXT NOT NULL, fingerprint TEXT NOT NULL, objective TEXT NOT NULL,
    budget TEXT NOT NULL, machine TEXT NOT NULL, threads INTEGER NOT NULL, version TEXT NOT NULL, output TEXT,
    reason TEXT
);
CREATE TABLE IF NOT EXISTS candidates (
    id TEXT PRIMARY KEY, run TEXT NOT NULL REFERENCES runs (id), place INTEGER NOT NULL, name TEXT NOT NULL,
    recipe TEXT NOT NULL, bytes INTEGER NOT NULL, fits INTEGER NOT NULL, chosen INTEGER NOT NULL, figures TEXT NOT NULL,
    choices TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS candidates_of_runs ON candidates (run);
"""
COLUMNS = "c.*, r.at, r.model, r.fingerprint, r.objective, r.budget, r.machine, r.threads, r.version, r.reason"


def place() -> Path:
    """The file's. Raises OutputError for a user without a home."""
    if folder := cache_folder():
        return folder / "trials.sqlite"
    raise OutputError("there is no cache folder to keep trials in: this user has no home", "set XDG_CACHE_HOME")


class History:
    """The file at `path`, made where it is to be written. A context manager. Raises OutputError where it is damaged,
    of a later version, or cannot be read or written."""

    def __init__(self, path: Path, write: bool = False) -> None:
        self.path = path
        try:
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
            where = f"{path.resolve().as_uri()}?mode={'rwc' if write else 'ro'}"
            self._base = sqlite3.connect(where, uri=True, isolation_level=None, timeout=WAIT_SECONDS)
            self._base.row_factory = sqlite3.Row
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA:
                self._base.close()
                raise OutputError(
                    f"{path} was written by a later version of hasten (schema {version}, this one knows {SCHEMA})",
                    "use that version, or move the file away to begin a new one",
                )
            if write:
                self._base.execute("PRAGMA journal_mode=WAL")
                self._base.execute("BEGIN IMMEDIATE")
                for statement in TABLES.split(";")[:-1]:
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA user_version = {SCHEMA}")
                self._base.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            raise self._explain(error) from None

    def add(self, run: Json, candidates: Sequence[Json]) -> None:
        """A run and its candidates; those of an earlier entry of the same run are replaced."""
        try:
            self._base.execute("BEGIN IMMEDIATE")
            self._base.execute("DELETE FROM candidates WHERE run = ?", (run["id"],))
            self._base.execute("DELETE FROM runs WHERE id = ?", (run["id"],))
            for table, row in (("runs", run), *(("candidates", c) for c in candidates)):
                names, marks = ", ".join(row), ", ".join("?" * len(row))
                self._base.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))
            self._base.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._explain(error) from None

    def find(self, model: str | None = None, limit: int = 50) -> list[Json]:
        """The newest candidates, those of the newest run first; of models whose name holds `model`."""
        like = "%" + "".join(f"\\{c}" if c in "%_\\" else c for c in model or "") + "%"
        return self._rows(
            f"SELECT {COLUMNS} FROM candidates c "
            "JOIN runs r ON c.run = r.id WHERE r.model LIKE ? ESCAPE '\\' ORDER BY r.at DESC, r.id, c.place LIMIT ?",
            (like, limit),
        )

    def get(self, id: str) -> Json:
        """The candidate whose id begins so. Raises InputError where there is none, or several."""
        rows = self._rows(
            f"SELECT {COLUMNS} FROM candidates c JOIN runs r ON c.run = r.id WHERE substr(c.id, 1, ?) = ? LIMIT 2",
            (len(id), id),
        )
        if len(rows) != 1:
            what = "no trial has an id that begins" if not rows else "several trials' ids begin"
            raise InputError(f"{what} with '{id}'", "`hasten trials` lists them")
        return rows[0]

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[Json]:
        try:
            found = [dict(row) for row in self._base.execute(query, values).fetchall()]
            for row in found:
                row["figures"], row["choices"] = json.loads(row["figures"]), json.loads(row["choices"])
        except (sqlite3.Error, ValueError) as error:
            raise self._explain(error) from None
        return found

    def __enter__(self) -> History:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._base.close()

    def _explain(self, error: Exception) -> OutputError:
        text = str(error)
        if "locked" in text:
            return OutputError(f"{self.path} is held by another process", "try again when it is done")
        if isinstance(error, ValueError) or any(
            w in text for w in ("malformed", "not a database", "no such", "corrupt")
        ):
            return OutputError(
                f"{self.path} is damaged: {text}", "move the file away: the next search begins a new one"
            )
        return OutputError(f"cannot use {self.path}: {text}", "is the disk full, or the folder not writable?")


def record(run: str, document: Json, fingerprint: str, choices: Mapping[str, Mapping[str, Choice]], at: str) -> None:
    """A search that is over, as its report's document has it. `choices`: each candidate's. Raises OutputError."""
    machine = document["machine"]
    row = {
        "id": run,
        "at": at,
        "model": document["model"],
        "fingerprint": fingerprint,
        "objective": document["objective"],
        "budget": document["budget"]["text"],
        "machine": f"{machine['cpu']}, {machine['instruction_set']}",
        "threads": machine["threads"],
        "version": made_by(),
        "output": document["output"],
        "reason": document["verdict"]["reason"],
    }
    found = []
    for number, one in enumerate([*document["candidates"], *document.get("others", ())]):
        own = {n: [c.format, c.method] for n, c in choices[one["name"]].items()}
        recipe = trials.digest([own, one.get("structure"), one.get("cache")])
        kept = ("readings", "speedup", "rate", "recipe", "structure", "cache", "cost", "cost_of_original", "allowance")
        found.append(
            {
                "id": trials.digest([run, number, recipe])[:12],
                "run": run,
                "place": number,
                "name": one["name"],
                "recipe": recipe,
                "bytes": one["bytes"],
                "fits": int(one["fits"]),
                "chosen": int(one["chosen"]),
                "figures": json.dumps({key: one.get(key) for key in kept}),
                "choices": json.dumps(own),
            }
        )
    with History(place(), write=True) as history:
        history.add(row, found)
