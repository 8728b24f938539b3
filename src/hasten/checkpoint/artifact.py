"""hasten's own directories: config.json, tokenizer.json, hasten-*.safetensors with packed weights, and hasten.json.

hasten.json: format_version; tensors (name -> format, shape, file); files (name -> bytes, sha256); blocks (shapes);
recipe; measurements; where the model has them, structure (how it departs from config.json) and kv_formats (of each
layer's cache). Weights are mapped and used as they lie: nothing is copied or packed again. Nothing in the directory is
ever executed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hasten import formats
from hasten.backends import cache
from hasten.checkpoint import safetensors
from hasten.checkpoint.files import plain_name, read_bytes, read_object, regular_size
from hasten.errors import CheckpointError, ConfigError, FormatError
from hasten.formats.base import Float32, Weight
from hasten.graph.graph import Graph, WeightSpec
from hasten.graph.ops import Activation, Attention, Gate
from hasten.graph.structure import parse, restructured

FACTS = "hasten.json"
VERSION, RESTRUCTURED = 1, 2
"""Format versions of an artifact whose graph is config.json's, and of one that departs from it: an older hasten reads
the first and says of the second that it is too new."""
SMALL = 64 << 20
"""Files up to this size are checked against their hash whenever an artifact is opened; larger ones by size."""


class Artifact:
    """The weights of an artifact directory, checked against the graph that its config.json builds.

    `graph` is that graph restructured as hasten.json says.
    """

    def __init__(self, path: Path, graph: Graph) -> None:
        self.path = path
        self.facts = read_facts(path)
        try:
            self.structure = parse(self.facts.get("structure", {}))
            graph = restructured(graph, self.structure)
        except ConfigError as error:
            raise CheckpointError(f"{path / FACTS}: {error.message}", error.hint) from None
        self.graph = graph
        self.bytes_on_disk = sum(self.facts["files"][name]["bytes"] for name in weight_files(self.facts))
        tensors = self.facts["tensors"]
        if set(tensors) != set(graph.weights):
            odd = sorted(set(tensors) ^ set(graph.weights))[0]
            raise CheckpointError(f"{path / FACTS} and config.json disagree about tensor '{odd[:200]}'")
        if self.facts["blocks"] != block_shapes(graph):
            raise CheckpointError(f"{path / FACTS}: block shapes differ from those config.json gives")
        _check_cache(path, self.facts.get("kv_formats", []), graph)
        self._files = {name: safetensors.File(path / name) for name in weight_files(self.facts)}
        self._formats: dict[str, formats.Format] = {}
        for spec in graph.weights.values():
            self._check(spec, tensors[spec.name])
        self.dtype = str(self.facts["dtype"])

    def _check(self, spec: WeightSpec, entry: dict[str, Any]) -> None:
        if entry["shape"] != list(spec.shape):
            raise CheckpointError(
                f"{self.path}: tensor '{spec.name}' has shape {entry['shape']}, config.json asks for {list(spec.shape)}"
            )
        if not spec.is_matrix and entry["format"] != "f32":
            raise CheckpointError(
                f"{self.path / FACTS}: vector '{spec.name}' has format '{entry['format'][:200]}', must be f32"
            )
        self._formats[spec.name] = formats.get(entry["format"])

    def format(self, spec: WeightSpec) -> str:
        return self._formats[spec.name].name

    def weight(self, spec: WeightSpec) -> Weight | Float32:
        file = self._files[self.facts["tensors"][spec.name]["file"]]
        if not spec.is_matrix:
            return self._vector(file, spec)
        rows, columns = spec.shape
        format = self._formats[spec.name]
        arrays = {}
        for part in format.array_specs(rows, columns):
            name = f"{spec.name}.{part}"
            if name not in file.tensors:
                raise CheckpointError(f"{file.path}: '{name}' is missing, {format.name} needs it")
            if file.tensors[name].begin % safetensors.ALIGNMENT:
                raise CheckpointError(f"{file.path}: tensor '{name}' is not aligned to {safetensors.ALIGNMENT} bytes")
            arrays[part] = file.array(name)
        try:
            return format.load(arrays, (rows, columns))
        except FormatError as error:
            raise CheckpointError(f"{file.path}: tensor '{spec.name}': {error.message}", error.hint) from None

    def _vector(self, file: safetensors.File, spec: WeightSpec) -> Float32:
        found = file.tensors.get(spec.name)
        if found is None or found.dtype != "F32" or found.shape != spec.shape:
            raise CheckpointError(f"{file.path}: tensor '{spec.name}' must be F32{list(spec.shape)}")
        values: Float32 = file.array(spec.name)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{file.path}: tensor '{spec.name}' holds NaN or infinite values")
        return values

    def tensor(self, spec: WeightSpec) -> Float32:
        weight = self.weight(spec)
        return weight.dense() if isinstance(weight, Weight) else np.array(weight)


def block_shapes(graph: Graph) -> list[dict[str, Any]]:
    """Heads and feed-forward width of each block: they belong to a block, not to the model."""
    shapes, widths = [], graph.widths()
    for block in graph.blocks:
        shape: dict[str, Any] = {}
        for node in graph.nodes[block.start : block.stop]:
            if isinstance(node.op, Attention):
                op = node.op
                shape["attention"] = {"heads": op.heads, "kv_heads": op.kv_heads, "head_dim": op.head_dim}
            if isinstance(node.op, Gate | Activation):
                shape["feed_forward"] = widths[node.outputs[0]]
        shapes.append(shape)
    return shapes


def _check_cache(path: Path, chosen: object, graph: Graph) -> None:
    """`kv_formats`, where there is one: a format of the cache for each layer."""
    known = isinstance(chosen, list) and all(isinstance(name, str) and name in cache.FORMATS for name in chosen)
    if not known or (chosen and len(chosen) != cache.layers(graph)):  # type: ignore[arg-type]
        raise CheckpointError(
            f"{path / FACTS}: kv_formats must name one of {', '.join(cache.FORMATS)} for each of "
            f"{cache.layers(graph)} layers"
        )


def weight_files(facts: dict[str, Any]) -> list[str]:
    return sorted(n for n in facts["files"] if n.endswith(".safetensors"))


def read_facts(path: Path) -> dict[str, Any]:
    """hasten.json with every field of the type it must have, and the files it names as large as it says.

    Raises CheckpointError naming the field or the file.
    """
    where = path / FACTS
    facts = read_object(where)
    version = facts.get("format_version")
    if type(version) is not int or version not in (VERSION, RESTRUCTURED):
        raise CheckpointError(
            f"{where} has format version {version!r}, this hasten reads {VERSION} and {RESTRUCTURED}",
            "upgrade hasten, or make it anew",
        )
    if ("structure" in facts) != (version == RESTRUCTURED):
        raise CheckpointError(f"{where}: format version {RESTRUCTURED}, and no other, states a structure")
    for name, kind in (("tensors", dict), ("files", dict), ("blocks", list), ("recipe", dict), ("measurements", dict)):
        if not isinstance(facts.get(name), kind):
            raise CheckpointError(f"{where}: {name} is missing or of the wrong type")
    if facts.get("dtype") not in ("f32", "f16", "bf16"):
        raise CheckpointError(f"{where}: dtype is {facts.get('dtype')!r}, must be f32, f16 or bf16")
    for name, entry in facts["files"].items():
        plain_name(name, "", where=str(where))
        if not _has(entry, bytes=int, sha256=str):
            raise CheckpointError(f"{where}: file '{name}' must have bytes and sha256")
        _check_file(path / name, entry)
    if "config.json" not in facts["files"]:
        raise CheckpointError(f"{where}: files does not name config.json")
    for name, entry in facts["tensors"].items():
        if not _has(entry, format=str, shape=list, file=str) or entry["file"] not in weight_files(facts):
            raise CheckpointError(f"{where}: tensor '{name[:200]}' must have format, shape and one of the files")
    return facts


def _has(entry: object, **fields: type) -> bool:
    return isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in fields.items())


def _check_file(path: Path, entry: dict[str, Any], whole: bool = False) -> None:
    size = regular_size(path)
    if size != entry["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, {FACTS} says {entry['bytes']}", "the file is damaged")
    if whole or (size <= SMALL and not path.name.endswith(".safetensors")):
        digest = hashlib.sha256(read_bytes(path, max(size, SMALL))).hexdigest()
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path} is not the file {FACTS} was written for (SHA-256 differs)")


def verify(path: Path) -> None:
    """Hash every file of an artifact, weights too. Raises CheckpointError naming the first that differs."""
    for name, entry in read_facts(path)["files"].items():
        _check_file(path / name, entry, whole=True)
