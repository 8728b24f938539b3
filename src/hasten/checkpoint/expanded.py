"""A restructured model as the plain one that computes the same, for programs that know no structure but config.json's.

Dropped blocks: fewer layers. Narrowed blocks: zeros in the place of what was removed, which then adds nothing. Factored
matrices: the product, with what stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import formats, models
from hasten.checkpoint.model import Model, Store
from hasten.errors import CheckpointError, ConfigError
from hasten.formats.base import Float32, Weight
from hasten.graph.graph import Graph, WeightSpec
from hasten.graph.ops import Attention, Rope
from hasten.graph.sites import attention_site, feed_forward_site
from hasten.graph.structure import LEFT, RIGHT, Structure, restructured

Int = npt.NDArray[np.int64]
Places = tuple[int, Int, Int]
"""Along which axis, where values go, and which they are."""


def expanded(model: Model) -> Model:
    """The plain model that gives the same logits, itself where it is plain already. Its larger matrices are f32.

    Raises CheckpointError where no config of its type describes what is left of its blocks.
    """
    if not model.structure:
        return model
    base = models.build(model.config, model.graph.context)
    kept = model.structure.kept(len(base.blocks))
    wanted = [n.op for n in restructured(base, Structure(model.structure.dropped)).nodes]
    for config in _configs(model.config, base, kept):
        try:
            graph = models.build(config, model.graph.context)
        except ConfigError:
            continue
        if [n.op for n in graph.nodes] == wanted:
            store = Expanded(model, graph, kept)
            return replace(model, config=config, graph=graph, structure=Structure(), store=store)
    raise CheckpointError(
        f"{model.source}: no config of type '{model.config.get('model_type')}' describes the blocks that are left",
        "--to onnx writes any graph",
    )


def without_dropped(model: Model) -> Model:
    """`expanded` where that changes no weight: a model that lacks whole blocks and nothing else."""
    only = Structure(model.structure.dropped) == model.structure
    return expanded(model) if only else model


def _configs(config: dict[str, Any], base: Graph, kept: list[int]) -> Iterator[dict[str, Any]]:
    """Configs that may describe what is left: as they state it, then with each layer's kind spelled out."""
    if config.get("model_type") == "gemma3":
        config = {"model_type": "gemma3_text", **config["text_config"]}
    made = {**config, "num_hidden_layers": len(kept)}
    for name in ("layer_types", "no_rope_layers"):
        if isinstance(config.get(name), list):
            made[name] = [config[name][i] for i in kept]
    yield made
    inside = [[n.op for n in base.nodes[b.start : b.stop]] for b in (base.blocks[i] for i in kept)]
    slides = [any(isinstance(op, Attention) and op.window is not None for op in ops) for ops in inside]
    types = {"layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides]}
    turned = {"no_rope_layers": [int(any(isinstance(op, Rope) for op in ops)) for ops in inside]}
    yield {**made, **types}
    yield {**made, **turned}
    yield {**made, **types, **turned}


class Expanded:
    """The weights of the plain model: those that are as they were in their own format, all else computed, as f32."""

    def __init__(self, model: Model, graph: Graph, kept: list[int]) -> None:
        assert model.store is not None
        self._store: Store = model.store
        self._own, self._graph = model.graph, graph
        self._names = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate(kept)}
        self._places = dict(self._all_places())
        self.dtype, self.bytes_on_disk = model.store.dtype, model.store.bytes_on_disk

    def _name(self, name: str) -> str:
        """What the restructured model calls it."""
        prefix = ".".join(name.split(".")[:3]) + "."
        return self._names[prefix] + name[len(prefix) :] if prefix in self._names else name

    def _unchanged(self, spec: WeightSpec) -> WeightSpec | None:
        name = self._name(spec.name)
        found = self._own.weights.get(name)
        return (
            found if found is not None and name + LEFT not in self._own.weights and found.shape == spec.shape else None
        )

    def format(self, spec: WeightSpec) -> str:
        own = self._unchanged(spec)
        return "f32" if own is None else self._store.format(own)

    def weight(self, spec: WeightSpec) -> Weight | Float32:
        own = self._unchanged(spec)
        if own is not None:
            return self._store.weight(own)
        values = self.tensor(spec)
        return formats.get("f32").pack(values) if spec.is_matrix else values

    def tensor(self, spec: WeightSpec) -> Float32:
        own = self._unchanged(spec)
        if own is not None:
            return self._store.tensor(own)
        values = self._multiplied(self._name(spec.name))
        if values.shape == spec.shape:
            return values
        axis, targets, sources = self._places[spec.name]
        out = np.zeros(spec.shape, np.float32)
        if axis == 0:
            out[targets] = values[sources]
        else:
            out[:, targets] = values[:, sources]
        return out

    def _multiplied(self, name: str) -> Float32:
        """A matrix of the restructured model, its factors multiplied."""
        weights = self._own.weights
        made = self._store.tensor(weights[name]) if name in weights else np.float32(0)
        if name + LEFT in weights:
            left, right = (self._store.tensor(weights[name + part]) for part in (LEFT, RIGHT))
            made = made + left @ right
        return np.asarray(made, np.float32)

    def _all_places(self) -> Iterator[tuple[str, Places]]:
        for index, block in enumerate(self._own.blocks):
            ops = [n.op for n in self._own.nodes[block.start : block.stop] if isinstance(n.op, Attention)]
            plain = self._graph.blocks[index]
            full = [n.op for n in self._graph.nodes[plain.start : plain.stop] if isinstance(n.op, Attention)]
            if ops != full:
                yield from self._heads(index, ops[0], full[0])
            yield from self._channels(index)

    def _heads(self, index: int, own: Attention, full: Attention) -> Iterator[tuple[str, Places]]:
        """A key head with more query heads than it may have in the plain model stands there several times."""
        size, room = own.heads // own.kv_heads, full.heads // full.kv_heads
        each = -(-size // room)
        if own.kv_heads * each > full.kv_heads:
            raise CheckpointError(
                f"block {index} has {own.heads} heads on {own.kv_heads} key heads, which no block of {full.heads} on "
                f"{full.kv_heads} holds",
                "--to onnx writes any graph",
            )
        of = np.arange(own.heads)
        head, place = of // size, of % size
        targets = (head * each + place // room) * room + place % room
        q, kv = (targets, of), (np.arange(own.kv_heads * each), np.repeat(np.arange(own.kv_heads), each))
        site = attention_site(self._graph, index)
        for way, (to, which) in zip(site.ways, (q, kv, kv), strict=True):
            for name in way[0].weights:
                yield name, (0, _features(to, full.head_dim), _features(which, full.head_dim))
        yield site.output.weights[0], (1, _features(q[0], full.head_dim), _features(q[1], full.head_dim))

    def _channels(self, index: int) -> Iterator[tuple[str, Places]]:
        site = feed_forward_site(self._graph, index)
        own = self._own.weights.get(self._name(site.inputs[0].weights[0]))
        own = own or self._own.weights[self._name(site.inputs[0].weights[0]) + LEFT]
        channels = np.arange(own.shape[0])
        for node in site.inputs:
            for name in node.weights:
                yield name, (0, channels, channels)
        yield site.output.weights[0], (1, channels, channels)


def _features(heads: Int, width: int) -> Int:
    return np.asarray((heads[:, None] * width + np.arange(width)).reshape(-1))
