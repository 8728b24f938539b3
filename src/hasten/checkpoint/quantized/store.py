"""The weights of a quantised checkpoint: matrices through the method's file, all else as plain tensors."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.checkpoint.files import read_optional_object
from hasten.checkpoint.grid import Grid
from hasten.checkpoint.huggingface import Tensors, Where, by_source, full_shape, locate
from hasten.checkpoint.quantized.packed import Parts
from hasten.errors import CheckpointError
from hasten.formats.base import Float32, Weight
from hasten.graph.graph import Graph, WeightSpec

DENSE = ("f32", "f16", "bf16")
NOT_METHODS = ("store", "packed")


def supported() -> list[str]:
    """Every quant_method that is read: the names of the files beside this one."""
    package = str(Path(__file__).parent)
    names = [m.name for m in pkgutil.iter_modules([package]) if m.name not in NOT_METHODS]
    return sorted(name.replace("_", "-") for name in names)


def quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """How the weights in `path` are quantised: config.json's quantization_config, or AutoGPTQ's quantize_config.json.

    None where they are plain. Raises CheckpointError for a method that is not read.
    """
    found = config.get("quantization_config")
    if found is None and list(path.glob("gptq_model*.safetensors")):
        stated = read_optional_object(path / "quantize_config.json")
        found = {**stated, "quant_method": "gptq"} if stated else None
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if not isinstance(found, dict) or method not in supported():
        raise CheckpointError(
            f"config.json: weights quantised by {method!r} are not read"[:200],
            f"read are: {', '.join(supported())}; or start from the original f32, f16 or bf16 checkpoint",
        )
    return found


class Quantized:
    """A directory whose config.json has a quantization_config."""

    def __init__(self, path: Path, config: dict[str, Any], quantization: dict[str, Any], graph: Graph) -> None:
        self.path = path
        method = importlib.import_module(
            f"hasten.checkpoint.quantized.{quantization['quant_method'].replace('-', '_')}"
        )
        method.check(quantization)
        files, where = locate(path, config)
        needed = by_source(graph)
        self._method, self._quantization = method, quantization
        self._parts: dict[str, tuple[Parts, tuple[int, ...]]] = {}
        self._formats: dict[str, str] = {}
        kinds: Counter[str] = Counter()
        for source in list(needed):
            stem = source.removesuffix(".weight")
            found = {part: where[f"{stem}.{part}"] for part in method.PARTS if f"{stem}.{part}" in where}
            shape = full_shape(needed[source])
            if len(shape) != 2 or not method.marks(found):
                continue
            for part in found:
                del where[f"{stem}.{part}"]
            self._parts[source] = (Parts(f"{path}: {stem}", found), shape)
            kinds[self._read(source).dense] += 1  # and now it is known to make sense
            del needed[source]
            _drop_empty_bias(where, f"{stem}.bias", needed)
        self._tensors = Tensors(path, files, where, needed)
        self._matrices = graph.matrices()
        self.bytes_on_disk = self._tensors.bytes_on_disk
        self.dtype = kinds.most_common(1)[0][0] if kinds else self._tensors.dtype

    def _read(self, source: str) -> Grid:
        """A matrix with its scales. Not kept: those of all matrices take much room."""
        parts, shape = self._parts[source]
        grid: Grid = self._method.read(f"{self.path}: tensor '{source}'", parts, shape, self._quantization)
        return grid

    def _grid(self, spec: WeightSpec) -> Grid | None:
        if spec.source not in self._parts:
            return None
        return replace(self._read(spec.source).rows(spec.rows), decided=self._formats.get(spec.name))

    def format(self, spec: WeightSpec) -> str:
        if spec.name not in self._formats:
            grid = self._grid(spec)
            self._formats[spec.name] = self._tensors.format(spec) if grid is None else grid.format
        return self._formats[spec.name]

    def tensor(self, spec: WeightSpec) -> Float32:
        grid = self._grid(spec)
        return self._tensors.tensor(spec) if grid is None else grid.values()

    def weight(self, spec: WeightSpec) -> Weight | Float32:
        if spec.is_matrix:
            self.format(spec)  # found out once
        grid = self._grid(spec)
        return self._tensors.weight(spec) if grid is None else grid.weight()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the matrices are held."""
        held = (self.format(spec) for spec in self._matrices if spec.source in self._parts)
        rounded = Counter(name for name in held if name in DENSE)
        return tuple(
            f"{count} quantised matrices are held as {kind}: no integer format here has their groups or scales"
            for kind, count in rounded.items()
        )


def _drop_empty_bias(where: Where, name: str, needed: dict[str, list[WeightSpec]]) -> None:
    """AutoGPTQ stores a bias of zeros for layers that have none."""
    if name in needed or name not in where:
        return
    file, stored = where[name]
    if not np.any(file.array(stored)):
        del where[name]
