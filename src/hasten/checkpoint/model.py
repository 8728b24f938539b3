"""A model on disk: what every part of hasten opens, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from hasten import formats, models
from hasten.checkpoint import demo, hub
from hasten.checkpoint.artifact import FACTS, Artifact
from hasten.checkpoint.files import read_object, read_optional_object
from hasten.checkpoint.gguf import model as gguf
from hasten.checkpoint.gguf.reader import File
from hasten.checkpoint.huggingface import Tensors, by_source, locate
from hasten.checkpoint.overlay import Overlay
from hasten.checkpoint.quantized import Quantized, quantization_of
from hasten.checkpoint.tokenizer import Tokenizer
from hasten.errors import CheckpointError
from hasten.formats.base import Float32, Weight
from hasten.graph.graph import Graph, WeightSpec
from hasten.graph.ops import Norm
from hasten.graph.structure import Structure, parse, restructured

Progress = Callable[[str, int, int], None]


class Store(Protocol):
    """Where weights come from: Tensors, Artifact, Quantized, gguf.Container or Overlay."""

    dtype: str
    bytes_on_disk: int

    def format(self, spec: WeightSpec) -> str: ...
    def tensor(self, spec: WeightSpec) -> Float32: ...
    def weight(self, spec: WeightSpec) -> Weight | Float32: ...


@dataclass(frozen=True)
class Model:
    """An opened model. Nothing large is read until `weights` or `tensor` asks for it."""

    source: str
    path: Path
    config: dict[str, Any]
    graph: Graph
    kind: Literal["huggingface", "artifact", "quantized", "gguf", "config"]
    dtype: str
    """f32, f16 or bf16: the original's."""
    generation: dict[str, Any] = field(default_factory=dict)
    """generation_config.json, or {}."""
    facts: dict[str, Any] = field(default_factory=dict)
    """hasten.json, or {}."""
    store: Store | None = None
    structure: Structure = field(default_factory=Structure)
    """How `graph` departs from what `config` builds."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError where it is missing or contradicts the model."""
        refused = read_optional_object(self.path / gguf.REFUSED)
        if refused:
            raise CheckpointError(f"{self.source}: {refused['error']}", refused["hint"])
        return Tokenizer(self.path, self.graph.vocabulary)

    @property
    def location(self) -> Path:
        """What `open` takes to open it again: its directory, or its GGUF file."""
        return self.store.path if isinstance(self.store, gguf.Container) else self.path

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: from generation_config.json, else config.json, else the tokenizer."""
        for values in (self.generation, self.config, self.config.get("text_config")):
            found = values.get("eos_token_id") if isinstance(values, dict) else None
            ids = found if isinstance(found, list) else [found]
            if ids and all(isinstance(i, int) and 0 <= i < self.graph.vocabulary for i in ids):
                return tuple(ids)
        eos = self.tokenizer.eos_token_id if (self.path / "tokenizer.json").exists() else None
        return () if eos is None else (eos,)

    @property
    def formats(self) -> dict[str, str]:
        """Format of every matrix by weight name."""
        return {spec.name: self._store.format(spec) for spec in self.graph.matrices()}

    @property
    def kv_formats(self) -> tuple[str, ...]:
        """The format of each layer's cache that an artifact was made for; empty where none was chosen."""
        return tuple(self.facts.get("kv_formats", ()))

    @property
    def bytes_on_disk(self) -> int:
        """Of the weight files."""
        return self._store.bytes_on_disk

    @property
    def _store(self) -> Store:
        if self.store is None:
            raise CheckpointError(f"{self.path} was opened without weights")
        return self.store

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how weights of another's format are held."""
        return tuple(getattr(self.store, "notes", ()))

    def tensor(self, name: str) -> Float32:
        """A weight of the graph as float32 [out, in] or [n]."""
        return self._store.tensor(self.graph.weights[name])

    def weight(self, name: str) -> Weight | Float32:
        """A weight of the graph as kernels read it: a matrix in its format, a vector as float32 [n]."""
        return self._store.weight(self.graph.weights[name])

    def weights(self, progress: Progress | None = None) -> dict[str, Weight | Float32]:
        """Every weight as kernels read it: matrices packed (an artifact's as they lie on disk), vectors float32.

        Raises CheckpointError naming a tensor that holds NaN or infinite values.
        """
        made: dict[str, Weight | Float32] = {}
        for done, spec in enumerate(self.graph.weights.values()):
            if progress is not None:
                progress("loading weights", done, len(self.graph.weights))
            made[spec.name] = self._store.weight(spec)
        if progress is not None:
            progress("loading weights", len(made), len(made))
        return made

    def at_context(self, context: int) -> Model:
        """This model built for sequences up to `context`, on which rope may depend. Raises ContextError."""
        return replace(self, graph=restructured(models.build(self.config, context), self.structure))

    def departing(self, later: Structure, new: Mapping[str, Weight | Float32]) -> Model:
        """This model with its graph changed further, and `new` weights where they differ. Raises ConfigError."""
        whole = self.structure.then(later, models.build(self.config, self.graph.context))
        store, facts = Overlay(self._store, new), dict(self.facts)
        if self.kv_formats:
            facts["kv_formats"] = [self.kv_formats[i] for i in later.kept(len(self.kv_formats))]
        return replace(self, graph=restructured(self.graph, later), structure=whole, store=store, facts=facts)


def open(source: str, weights: bool = True) -> Model:
    """Open `source`: "demo", a local Hugging Face directory (plain, or quantised as GPTQ, AWQ or compressed-tensors), a
    hasten artifact, a GGUF file, or a hub id (org/name).

    With `weights=False` a directory (or a file) that holds no more than the config is enough. Raises CheckpointError,
    ConfigError or HubError.
    """
    path = _locate(source, weights)
    if path.suffix == ".gguf":
        return _open_gguf(source, path)
    config_file = path / "config.json" if path.is_dir() else path
    config = read_object(config_file)
    quantization = quantization_of(path, config) if weights and path.is_dir() else None
    config.pop("quantization_config", None)  # of the weights on disk: what is made of them says for itself
    graph = models.build(config)
    directory = config_file.parent
    generation = read_optional_object(directory / "generation_config.json")
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = {"float16": "f16", "bfloat16": "bf16"}.get(stated, "f32")
    common: dict[str, Any] = {"source": source, "path": directory, "config": config, "generation": generation}
    if not weights:
        structure = parse(read_optional_object(directory / FACTS).get("structure", {}))
        return Model(**common, graph=restructured(graph, structure), kind="config", dtype=dtype, structure=structure)
    if (path / FACTS).exists():
        artifact = Artifact(path, graph)
        common |= {"graph": artifact.graph, "structure": artifact.structure}
        return Model(**common, kind="artifact", dtype=artifact.dtype, facts=artifact.facts, store=artifact)
    if quantization is not None:
        quantized = Quantized(path, config, quantization, graph)
        return Model(**common, graph=graph, kind="quantized", dtype=quantized.dtype, store=quantized)
    tensors = Tensors(path, *locate(path, config), by_source(graph))
    return Model(**common, graph=graph, kind="huggingface", dtype=tensors.dtype, store=tensors)


def _open_gguf(source: str, path: Path) -> Model:
    file = File(path)
    folder, config = gguf.small_files(file)
    graph = models.build(config)
    store = gguf.Container(file, graph)
    return Model(source, folder, config, graph, "gguf", store.dtype, store=store)


def _locate(source: str, weights: bool) -> Path:
    if source == "demo":
        return demo.directory()
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_directory(path)
    if path.is_file() and (not weights or path.suffix == ".gguf"):
        return path
    if path.exists():
        raise CheckpointError(f"{source} is not a model directory", "name the directory that holds config.json")
    if hub.is_id(source) and not Path(source.split("/")[0]).is_dir():  # a mistyped local path is not sent anywhere
        return hub.fetch(source, weights)
    raise CheckpointError(
        f"there is no model at '{source}'", "name a local directory, a hub id such as org/name, a .gguf file, or demo"
    )


def _in_directory(path: Path) -> Path:
    """The one GGUF file of a directory that holds no config.json, else the directory."""
    if (path / "config.json").exists():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(f"{path} holds {len(found)} GGUF files", f"name one of them, {found[0].name} say")
    return found[0] if found else path


def random_weights(graph: Graph, format_name: str, seed: int = 0) -> dict[str, Weight | Float32]:
    """Random weights of one format in the shapes of `graph`, for benches: norms near one, biases near zero."""
    format = formats.get(format_name)
    rng = np.random.default_rng(seed)
    centre = {n.weights[0]: 1 - n.op.offset for n in graph.nodes if isinstance(n.op, Norm)}
    made: dict[str, Weight | Float32] = {}
    for number, spec in enumerate(graph.weights.values()):
        if spec.is_matrix:
            made[spec.name] = format.random(spec.shape[0], spec.shape[1], seed + number)
        else:
            made[spec.name] = rng.normal(centre.get(spec.name, 0.0), 0.02, spec.shape).astype(np.float32)
    return made
