"""Writing an artifact: everything goes into a temporary directory that is renamed at the end, or removed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten.backends import cache
from hasten.checkpoint import safetensors
from hasten.checkpoint.artifact import FACTS, RESTRUCTURED, VERSION, block_shapes
from hasten.errors import CheckpointError, OutputError
from hasten.formats.base import Float32, Weight

if TYPE_CHECKING:
    from hasten.checkpoint.model import Model

SHARD = 4 << 30
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
Arrays = dict[str, npt.NDArray[Any]]


def write_artifact(
    out: str | os.PathLike[str],
    model: Model,
    weights: Mapping[str, Weight | Float32],
    recipe: Mapping[str, Any],
    measurements: Mapping[str, Any],
    kv_formats: Sequence[str] = (),
) -> Path:
    """Write `weights` (every weight of model.graph) with the model's config and tokenizer as an artifact at `out`.

    `kv_formats`: of each layer's cache, what serving takes where nobody asks for another.

    Raises BackendError where these are not the model's layers', OutputError where `out` exists and is not empty, cannot
    be written, or the disk is full: nothing is left.
    """
    if kv_formats:
        cache.formats_of(model.graph, tuple(kv_formats))
    path = Path(out).absolute()
    check_output(path)
    shards = list(_shards(model, weights))
    _check_space(path, sum(safetensors.layout(s, {})[1] for s in shards))
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        facts: dict[str, Any] = {"recipe": dict(recipe), "measurements": dict(measurements)}
        if kv_formats:
            facts["kv_formats"] = list(kv_formats)
        _fill(staging, model, weights, shards, facts)
        os.chmod(staging, 0o777 & ~_umask())
        os.rename(staging, path)  # replaces an empty directory
        staging = None
        with contextlib.suppress(OSError):  # the artifact stands, whether its name is durable yet or not
            _sync(path.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise OutputError(
            f"{path} cannot be written: {reason}",
            "free some space or choose another disk; nothing was left behind" if full else None,
        ) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise OutputError where an artifact could not be written at `path`: asked before hours of work, not after."""
    path = Path(path).absolute()
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise OutputError(f"{path} exists and is not a directory", "choose another output")
        if path.is_dir() and any(path.iterdir()):
            raise OutputError(f"{path} exists and is not empty", "choose another output, or remove it first")
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}") from None
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: {parent} is not a directory that you may write to")


def _check_space(path: Path, needed: int) -> None:
    parent = next(p for p in path.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{path} needs {needed / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB left",
            "free some space or choose another disk",
        )


def _shards(model: Model, weights: Mapping[str, Weight | Float32]) -> Iterator[Arrays]:
    """Stored arrays, in files of about SHARD bytes; a weight's arrays stay together."""
    if set(weights) != set(model.graph.weights):
        odd = sorted(set(weights) ^ set(model.graph.weights))[0]
        raise CheckpointError(f"the weights to write and the model's graph disagree about '{odd}'")
    shard: Arrays = {}
    size = 0
    for name in model.graph.weights:
        arrays = stored_arrays(name, weights[name])
        bytes_needed = sum(a.nbytes for a in arrays.values())
        if shard and size + bytes_needed > SHARD:
            yield shard
            shard, size = {}, 0
        shard |= arrays
        size += bytes_needed
    yield shard


def stored_arrays(name: str, weight: Weight | Float32) -> Arrays:
    if isinstance(weight, Weight):
        return {f"{name}.{array}": values for array, values in weight.arrays.items()}
    return {name: np.ascontiguousarray(weight, dtype=np.float32)}


def _fill(
    staging: Path,
    model: Model,
    weights: Mapping[str, Weight | Float32],
    shards: list[Arrays],
    facts: dict[str, Any],
) -> None:
    files: dict[str, dict[str, Any]] = {}
    homes: dict[str, str] = {}

    def record(name: str, digest: str) -> None:
        files[name] = {"bytes": (staging / name).stat().st_size, "sha256": digest}

    def put(name: str, data: bytes) -> None:
        _write(staging / name, data)
        record(name, hashlib.sha256(data).hexdigest())

    for number, arrays in enumerate(shards, 1):
        name = f"hasten-{number:05d}.safetensors"
        record(name, safetensors.write(staging / name, arrays, {"format": "hasten"}))
        homes |= dict.fromkeys(arrays, name)
    put("config.json", json.dumps(model.config, indent=1).encode() + b"\n")
    for name in BESIDE:
        if (model.path / name).is_file():
            put(name, (model.path / name).read_bytes())
    tensors = {
        name: {
            "format": weight.format.name if isinstance(weight, Weight) else "f32",
            "shape": list(weight.shape),
            "file": homes[next(iter(stored_arrays(name, weight)))],
        }
        for name, weight in weights.items()
    }
    document = {
        "format_version": RESTRUCTURED if model.structure else VERSION,
        "hasten": made_by(),
        "source": model.source,
        "dtype": model.dtype,
        "blocks": block_shapes(model.graph),
        **({"structure": model.structure.json()} if model.structure else {}),
        "tensors": tensors,
        "files": files,
        **facts,
    }
    _write(staging / FACTS, json.dumps(document, indent=1).encode() + b"\n")
    _sync(staging)


def made_by() -> str:
    """The version of hasten that is installed, or "source"."""
    try:
        return metadata.version("hasten")
    except metadata.PackageNotFoundError:
        return "source"


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
