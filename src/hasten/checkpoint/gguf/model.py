"""A GGUF file as a model: its weights as a Store, and the small files of a model directory made from its key-values."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hasten import formats
from hasten.checkpoint.files import LARGEST_TOKENIZER, read_bytes
from hasten.checkpoint.gguf.config import ROPE_FACTORS, architecture, config
from hasten.checkpoint.gguf.decode import half
from hasten.checkpoint.gguf.export import tensor_name
from hasten.checkpoint.gguf.reader import File
from hasten.checkpoint.gguf.tokens import definition
from hasten.checkpoint.grid import Grid
from hasten.errors import CheckpointError, FormatError
from hasten.formats.base import Float32, Weight
from hasten.graph.graph import Graph, WeightSpec
from hasten.graph.ops import Attention

BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
REFUSED = "no-tokenizer.json"
CHUNK = 1 << 21
"""Numbers decoded at a time."""


class Container:
    """The weights of a GGUF file under the names that `graph` gives them."""

    def __init__(self, file: File, graph: Graph) -> None:
        self.path, self._file, self._graph = file.path, file, graph
        attention = next(n.op for n in graph.nodes if isinstance(n.op, Attention))
        turned = architecture(file) == "llama"  # neighbours pair in its rope: see export.permuted
        self._heads = {"q_proj": attention.heads, "k_proj": attention.kv_heads} if turned else {}
        names = {tensor_name(name) for name in graph.weights}
        unused = sorted(set(file.tensors) - names - {ROPE_FACTORS})
        if unused:
            raise CheckpointError(
                f"{self.path}: tensor '{unused[0][:200]}' is not used by architecture '{architecture(file)}'",
                "ignoring weights would give wrong results",
            )
        self._formats: dict[str, str] = {}
        sizes: Counter[str] = Counter()
        for spec in graph.weights.values():
            entry = self._check(spec)
            sizes[entry.type.dense] += entry.nbytes * spec.is_matrix
        self.dtype = sizes.most_common(1)[0][0]
        self.bytes_on_disk = file.size

    def _check(self, spec: WeightSpec) -> Any:
        name = tensor_name(spec.name)
        entry = self._file.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor '{name}' is missing")
        if entry.shape != spec.shape:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' has shape {list(entry.shape)}, its key-values ask for {list(spec.shape)}"
            )
        return entry

    def _rows(self, spec: WeightSpec) -> Any:
        """The rows' bytes, in Hugging Face's order: [rows, bytes]; of a vector one row a number."""
        name = tensor_name(spec.name)
        data = self._file.rows(name)
        if not spec.is_matrix:
            data = data.reshape(spec.shape[0], -1)
        heads = next((n for part, n in self._heads.items() if f".{part}." in spec.name), None)
        if heads is None:
            return data
        rows = data.shape[0]
        return data[np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)]

    def _grid(self, spec: WeightSpec) -> Grid | None:
        """Where the type is one scale and integers to a block. Not kept: scales of all matrices take much room."""
        name = tensor_name(spec.name)
        entry = self._file.tensors[name]
        kind = entry.type
        if kind.levels is None or not spec.is_matrix:
            return None
        rows, columns = spec.shape
        read = kind.levels
        scales = self._decoded(spec, lambda blocks: half(blocks, 0), np.float32, 1)
        return Grid(
            f"{self.path}: tensor '{name}'",
            (rows, columns),
            lambda: self._decoded(spec, read, np.int16),
            kind.low,
            kind.high,
            scales,
            kind.block,
            kind.dense,
            decided=self._formats.get(name),
        )

    def _decoded(self, spec: WeightSpec, decode: Any, dtype: Any, width: int | None = None) -> Any:
        """All blocks of a tensor through `decode`, some at a time: [rows, numbers], `width` numbers a block."""
        kind = self._file.tensors[tensor_name(spec.name)].type
        data = self._rows(spec)
        blocks = data.reshape(-1, kind.block_bytes)
        out = np.empty((len(blocks), width or kind.block), dtype)
        step = CHUNK // kind.block
        for start in range(0, len(blocks), step):
            out[start : start + step] = decode(blocks[start : start + step])
        return out.reshape(data.shape[0], -1)

    def format(self, spec: WeightSpec) -> str:
        name = tensor_name(spec.name)
        if name not in self._formats:
            grid = self._grid(spec)
            self._formats[name] = self._file.tensors[name].type.dense if grid is None else grid.format
        return self._formats[name]

    def tensor(self, spec: WeightSpec) -> Float32:
        """float32 as llama.cpp dequantises it. Raises CheckpointError where a value is NaN or infinite."""
        kind = self._file.tensors[tensor_name(spec.name)].type
        with np.errstate(all="ignore"):
            values: Float32 = self._decoded(spec, kind.values, np.float32).reshape(spec.shape)
            finite = np.isfinite(values.sum(dtype=np.float64))
        if not finite:
            raise CheckpointError(f"{self.path}: tensor '{tensor_name(spec.name)}' holds NaN or infinite values")
        return values

    def weight(self, spec: WeightSpec) -> Weight | Float32:
        format = self.format(spec)
        grid = self._grid(spec)
        if grid is not None:
            return grid.weight()
        values = self.tensor(spec)
        if not spec.is_matrix:
            return values
        try:
            return formats.get(format).pack(values)
        except FormatError as error:
            raise CheckpointError(
                f"{self.path}: tensor '{tensor_name(spec.name)}': {error.message}", error.hint
            ) from None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the matrices are held."""
        kinds = {spec: self._file.tensors[tensor_name(spec.name)].type for spec in self._graph.matrices()}
        rounded = Counter(kind.name for s, kind in kinds.items() if kind.block > 1 and self.format(s) == kind.dense)
        return tuple(
            f"{n} matrices of {name} are held as f16, the nearest to each value" for name, n in rounded.items()
        )


def small_files(file: File) -> tuple[Path, dict[str, Any]]:
    """(folder, config): config.json and tokenizer files of a GGUF file, in the user's cache, made once a file.

    A tokenizer.json beside the file goes before the one inside it; where neither serves, REFUSED holds the reason.
    Without a cache to write to they lie in a folder that goes when the process ends.
    """
    status = os.stat(file.path)
    beside = {name: file.path.with_name(name) for name in BESIDE} if file.path.with_name(BESIDE[0]).is_file() else {}
    contents = {n: read_bytes(p, LARGEST_TOKENIZER) for n, p in beside.items() if p.is_file()}
    digest = hashlib.sha256(file.header())
    digest.update(f"{VERSION} {file.size} {status.st_mtime_ns}".encode())
    for name, data in contents.items():
        digest.update(name.encode() + data)
    # What tells this model from another of the same shape, for all who name a model by its config.
    stated = config(file) | {"source_gguf": f"{file.path.name} {digest.hexdigest()[:32]}"}
    folder = _cache(f"gguf-{digest.hexdigest()[:32]}")
    if folder is not None and (folder / "config.json").is_file():
        return folder, stated
    contents |= {} if contents else _tokenizer(file)
    contents["config.json"] = json.dumps(stated, indent=1).encode()
    return _store(folder, contents), stated


VERSION = 1
"""Of what is made of a header: another one is made anew."""


def _tokenizer(file: File) -> dict[str, bytes]:
    try:
        tokenizer, settings = definition(file.metadata)
    except CheckpointError as error:
        return {REFUSED: json.dumps({"error": error.message, "hint": error.hint}).encode()}
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False).encode(),
    }


def _cache(name: str) -> Path | None:
    from hasten.backends.host import cache_folder

    home = cache_folder()
    return None if home is None else home / "gguf" / name


def _store(folder: Path | None, contents: dict[str, bytes]) -> Path:
    try:
        if folder is None:
            raise OSError
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    except OSError:
        staging = Path(tempfile.mkdtemp(prefix="hasten-gguf-"))
        atexit.register(shutil.rmtree, staging, ignore_errors=True)
        folder = None
    for name, data in contents.items():
        (staging / name).write_bytes(data)
    if folder is None:
        return staging
    try:
        staging.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(staging, ignore_errors=True)
    return folder
