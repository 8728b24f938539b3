"""The weights of a quantised checkpoint: matrices through the method's file, all else as plain tensors."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
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
        method = importlib.import_module(
            f"hasten.checkpoint.quantized.{quantization['quant_method'].replace('-', '_')}"
        )
        method.check(quantization)
        files, where = locate(path, config)
        needed = by_source(graph)
        self._grids: dict[str, Grid] = {}
        for source in list(needed):
            stem = source.removesuffix(".weight")
            found = {part: where[f"{stem}.{part}"] for part in method.PARTS if f"{stem}.{part}" in where}
            shape = full_shape(needed[source])
            if len(shape) != 2 or not method.marks(found):
                continue
            for part in found:
                del where[f"{stem}.{part}"]
            parts = Parts(f"{path}: {stem}", found)
            self._grids[source] = method.read(f"{path}: tensor '{source}'", parts, shape, quantization)
            del needed[source]
            _drop_empty_bias(where, f"{stem}.bias", needed)
        self._tensors = Tensors(path, files, where, needed)
        self._matrices = graph.matrices()
        self.bytes_on_disk = self._tensors.bytes_on_disk
        kinds = Counter(g.dense for g in self._grids.values())
        self.dtype = kinds.most_common(1)[0][0] if kinds else self._tensors.dtype

    def _grid(self, spec: WeightSpec) -> Grid | None:
        found = self._grids.get(spec.source)
        if found is not None and spec.rows is not None:
            # Kept, so that what is found out about a part is found out once.
            key = f"{spec.source} {spec.rows}"
            return self._grids.setdefault(key, found.rows(spec.rows))
        return found

    def format(self, spec: WeightSpec) -> str:
        grid = self._grid(spec)
        return self._tensors.format(spec) if grid is None else grid.format

    def tensor(self, spec: WeightSpec) -> Float32:
        grid = self._grid(spec)
        return self._tensors.tensor(spec) if grid is None else grid.values()

    def weight(self, spec: WeightSpec) -> Weight | Float32:
        grid = self._grid(spec)
        return self._tensors.weight(spec) if grid is None else grid.weight()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the matrices are held."""
        grids = [g for g in map(self._grid, self._matrices) if g is not None]
        rounded = Counter(g.dense for g in grids if not g.is_exact)
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
