"""Weights of a Hugging Face directory: model.safetensors, or shards with an index. f32, f16 and bf16."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hasten import formats, models
from hasten.checkpoint import safetensors
from hasten.checkpoint.files import plain_name, read_object
from hasten.errors import CheckpointError, FormatError
from hasten.formats.base import Float32, Weight
from hasten.graph.graph import Graph, WeightSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


class Tensors:
    """A checkpoint's tensors under the names that `graph` gives them, checked against what it needs."""

    def __init__(self, path: Path, config: dict[str, Any], graph: Graph) -> None:
        self.path = path
        self.files = _open_files(path)
        self._where: dict[str, tuple[safetensors.File, str]] = {}
        for file in self.files:
            for stored in file.tensors:
                name = models.renamed(config, stored)
                if name is None:
                    continue
                if name in self._where:
                    raise CheckpointError(f"{path}: tensor '{name}' is stored twice")
                self._where[name] = (file, stored)
        self._check(graph)
        sizes: Counter[str] = Counter()
        for spec in graph.matrices():
            sizes[self.format(spec)] += int(np.prod(spec.shape))
        self.dtype = sizes.most_common(1)[0][0]
        self.bytes_on_disk = sum(file.size for file in self.files)

    def _check(self, graph: Graph) -> None:
        needed: dict[str, list[WeightSpec]] = {}
        for spec in graph.weights.values():
            needed.setdefault(spec.source, []).append(spec)
        missing = [name for name in needed if name not in self._where]
        if missing:
            raise CheckpointError(
                f"{self.path}: {_some(missing)} missing from the weights",
                "the download is incomplete, or config.json is of another model",
            )
        unused = [n for n in self._where if n not in needed and n != "lm_head.weight"]  # stored with some tied heads
        if unused:
            raise CheckpointError(
                f"{self.path}: {_some(unused)} not used by model type '{graph_type(self.path)}'",
                "ignoring weights would give wrong results: config.json is of another model or lacks a field",
            )
        for source, specs in needed.items():
            file, stored = self._where[source]
            found = file.tensors[stored]
            rows = max(s.rows[1] if s.rows else s.shape[0] for s in specs)
            expected = (rows, *specs[0].shape[1:])
            if found.shape != expected:
                raise CheckpointError(
                    f"{self.path}: tensor '{source}' has shape {list(found.shape)}, config.json asks for "
                    f"{list(expected)}"
                )
            if found.dtype not in FORMATS:
                raise CheckpointError(
                    f"{self.path}: tensor '{source}' is {found.dtype}, must be one of {', '.join(FORMATS)}"
                )

    def format(self, spec: WeightSpec) -> str:
        file, stored = self._where[spec.source]
        return FORMATS[file.tensors[stored].dtype]

    def tensor(self, spec: WeightSpec) -> Float32:
        """float32 [out, in] or [n]. Raises CheckpointError where a value is NaN or infinite."""
        file, stored = self._where[spec.source]
        array = file.array(stored)
        if spec.rows is not None:
            array = array[spec.rows[0] : spec.rows[1]]
        values = safetensors.to_float32(array, file.tensors[stored].dtype)
        with np.errstate(all="ignore"):
            finite = np.isfinite(values.sum(dtype=np.float64))
        if not finite:
            raise CheckpointError(
                f"{file.path}: tensor '{stored}' holds NaN or infinite values", "the checkpoint is damaged"
            )
        return values

    def weight(self, spec: WeightSpec) -> Weight | Float32:
        values = self.tensor(spec)
        if not spec.is_matrix:
            return values
        try:
            return formats.get(self.format(spec)).pack(values)
        except FormatError as error:
            raise CheckpointError(f"{self.path}: tensor '{spec.source}': {error.message}", error.hint) from None


def graph_type(path: Path) -> str:
    return str(read_object(path / "config.json").get("model_type"))


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{n[:200]}'" for n in names[:3])
    many = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{many} {'are' if len(names) > 1 else 'is'}"


def _open_files(path: Path) -> list[safetensors.File]:
    if (path / INDEX).exists():
        return _open_shards(path)
    if (path / SINGLE).exists() or (path / SINGLE).is_symlink():
        return [safetensors.File(path / SINGLE)]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} holds its weights as {pickles[0]}, which could run code when read",
            "convert the checkpoint to safetensors first",
        )
    raise CheckpointError(f"{path} holds no weights: neither {SINGLE} nor {INDEX}")


def _open_shards(path: Path) -> list[safetensors.File]:
    index = path / INDEX
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    names = sorted({plain_name(name, ".safetensors", f"{index}: weight_map") for name in weight_map.values()})
    files = {name: safetensors.File(path / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise CheckpointError(f"{index} places tensor '{tensor[:200]}' in {name}, which does not hold it")
    for name, file in files.items():
        for tensor in file.tensors:
            if weight_map.get(tensor) != name:
                raise CheckpointError(
                    f"{path / name} holds tensor '{tensor[:200]}', which the index does not place there"
                )
    return list(files.values())
