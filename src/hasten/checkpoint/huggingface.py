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
Where = dict[str, tuple[safetensors.File, str]]
"""The graph's name of a tensor -> the file that holds it, and its name there."""


def locate(path: Path, config: dict[str, Any]) -> tuple[list[safetensors.File], Where]:
    """The weight files of a directory and where each tensor lies. Raises CheckpointError for one stored twice."""
    files = _open_files(path)
    where: Where = {}
    for file in files:
        for stored in file.tensors:
            name = models.renamed(config, stored)
            if name is None:
                continue
            if name in where:
                raise CheckpointError(f"{path}: tensor '{name}' is stored twice")
            where[name] = (file, stored)
    return files, where


def by_source(graph: Graph) -> dict[str, list[WeightSpec]]:
    """Tensor of the checkpoint -> the weights cut from it, in the order of their rows."""
    made: dict[str, list[WeightSpec]] = {}
    for spec in graph.weights.values():
        made.setdefault(spec.source, []).append(spec)
    for specs in made.values():
        specs.sort(key=lambda spec: spec.rows or (0, 0))
    return made


def full_shape(specs: list[WeightSpec]) -> tuple[int, ...]:
    """Shape of the tensor that `specs` are cut from."""
    return (max(s.rows[1] if s.rows else s.shape[0] for s in specs), *specs[0].shape[1:])


class Tensors:
    """Plain tensors, checked against what a graph needs of them: `needed` is by_source's, or a part of it."""

    notes: tuple[str, ...] = ()

    def __init__(
        self, path: Path, files: list[safetensors.File], where: Where, needed: dict[str, list[WeightSpec]]
    ) -> None:
        self.path = path
        self._where = where
        self._check(needed)
        sizes: Counter[str] = Counter()
        for spec in (spec for specs in needed.values() for spec in specs):
            if spec.is_matrix:
                sizes[self.format(spec)] += int(np.prod(spec.shape))
        self.dtype = sizes.most_common(1)[0][0] if sizes else "f16"
        self.bytes_on_disk = sum(file.size for file in files)

    def _check(self, needed: dict[str, list[WeightSpec]]) -> None:
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
            expected = full_shape(specs)
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
    alone = list(path.glob("gptq_model*.safetensors"))  # as AutoGPTQ names it
    if len(alone) == 1:
        return [safetensors.File(alone[0])]
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
