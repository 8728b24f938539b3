"""Reading the small files of a model directory: regular files of bounded size, and JSON that is what it must be.

And writing a file so that nobody ever sees half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from hasten.errors import CheckpointError, OutputError

LARGEST_JSON = 64 << 20
LARGEST_TOKENIZER = 512 << 20


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file; symbolic links are followed, as the hub's cache is made of them.

    Raises CheckpointError where it is missing, cannot be read, or is a folder, pipe or device.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        hint = f"is {path.parent} the folder of a model?" if path.name == "config.json" else None
        raise CheckpointError(f"{path} is missing", hint) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file")
    return status.st_size


def read_bytes(path: Path, limit: int = LARGEST_JSON) -> bytes:
    size = regular_size(path)
    if size > limit:
        raise CheckpointError(f"{path} has {size} bytes, more than the {limit} that such a file may have")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: Path, limit: int = LARGEST_JSON) -> str:
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is not UTF-8 text") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook that refuses a key given twice: readers would differ in which they take."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is given twice")
    return made


def parse_object(data: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object, or CheckpointError naming `what`."""
    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, must hold an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    return parse_object(read_bytes(path), str(path))


def read_optional_object(path: Path) -> dict[str, Any]:
    """As read_object; {} where there is no such file."""
    return read_object(path) if os.path.lexists(path) else {}


DECIDING = (
    *("config.json", "hasten.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)


def fingerprint(path: Path) -> str:
    """Of a model's directory: the small files that decide its output, and name, size and time of those with weights."""
    digest = hashlib.sha256()
    for name in DECIDING:
        if (path / name).is_file():
            digest.update(name.encode() + b"\n" + (path / name).read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def plain_name(name: object, suffix: str, where: str) -> str:
    """`name` if it is a file name of `suffix` and no path: an index may not lead out of its directory."""
    if (
        not isinstance(name, str)
        or not name.endswith(suffix)
        or name != os.path.basename(name)
        or name.startswith(".")
        or "\\" in name
        or "\0" in name
    ):
        raise CheckpointError(f"{where} names the file {name!r}, must be a plain name ending in {suffix}")
    return name


def writable(path: Path) -> None:
    """Raises OutputError where a file could not be put at `path`: said before hours of work, not after."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is no directory")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} exists and is not a file", "choose another output")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent} cannot be written to", "choose another output")


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path`, in place of any file there: all of it or, with an OutputError, nothing."""
    path = Path(os.path.realpath(path))
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} exists and is not a file", "choose another output")
        try:
            with open(staging, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staging, path)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
