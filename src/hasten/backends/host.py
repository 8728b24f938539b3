"""What this process runs on and with: the processor, the native build, the user's cache folder, the instruction set."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path

from hasten import _native
from hasten.errors import BackendError


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as its maker writes it, or the architecture's."""
    try:
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def native_build() -> str:
    """A hash of the native module."""
    with Path(_native.__file__).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@functools.cache
def sources() -> str:
    """A hash of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(Path(_native.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path | None:
    """hasten's folder in the user's cache; None where the user has no home."""
    try:
        return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hasten").expanduser()
    except RuntimeError:
        return None


def active_isa() -> str:
    """The instruction set in use. Raises BackendError where HASTEN_ISA asks for what this processor does not have."""
    try:
        return str(_native.active_isa())
    except ValueError as error:
        available = ", ".join(_native.available_isas())
        raise BackendError(str(error), f"this processor runs: {available}; unset HASTEN_ISA for the best") from None
