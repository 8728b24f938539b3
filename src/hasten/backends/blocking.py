"""How this machine's work is best cut: measured once by the steps that serve, and remembered between processes.

Only speed hangs on it: the bits are the same whatever is chosen, so a lost or strange file costs a new measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from hasten.backends.host import cache_folder, cpu_name, native_build

LARGEST = 4 << 20
FIELDS = (str, int, int, int, int)
"""signature, regime, chunks per thread, tokens, tile bytes: what the core hands out and takes."""


def file(isa: str, threads: int) -> Path | None:
    """Of this processor, build, instruction set and number of threads; None where the user has no cache folder."""
    key = hashlib.sha256(json.dumps([cpu_name(), native_build(), isa, threads]).encode()).hexdigest()[:16]
    folder = cache_folder()
    return folder and folder / f"blocking-{key}.json"


def recall(program: Any) -> None:
    """Tell the native program what earlier processes found."""
    path = file(program.isa, program.threads)
    for entry in _read(path) if path else []:
        program.remember(entry)


def keep(program: Any) -> None:
    """Add what the native program found to the file, in one step; where nothing can be written, nothing is kept."""
    path = file(program.isa, program.threads)
    if not program.tuned or path is None:
        return
    entries = {entry[:2]: entry for entry in (*_read(path), *program.blockings())}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(list(entries.values())))
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise


def _read(path: Path) -> list[tuple[Any, ...]]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            return []
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [tuple(entry) for entry in found if _is_entry(entry)] if isinstance(found, list) else []


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == len(FIELDS)
        and all(type(value) is kind for value, kind in zip(entry, FIELDS, strict=True))
        and entry[0].isascii()
        and all(0 <= value < 1 << 31 for value in entry[1:])
    )
