"""The ops: what each is called, its attributes, the width of what it makes, and its formula.

Formulas are written once against the array API standard: on NumPy in float64 they are the oracle of every kernel test,
on PyTorch they are differentiable. They know nothing of paging or fusion: a sequence stands alone, [tokens, width].
Leading axes (a batch of sequences of one length) pass through.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from array_api_compat import array_namespace, device

from hasten.errors import ConfigError
from hasten.graph.functions import ActivationKind, Array, activate, softmax

Shape = tuple[int, ...]
Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Span:
    """What a formula may know beside its inputs."""

    positions: Array  # [tokens]
    rows: Array | None = None  # [rows] indices of tokens whose logits are wanted; None: all
    hidden: Array | None = None  # [tokens, width] what Input hands in


@dataclass(frozen=True)
class Op(ABC):
    """Base of all ops: frozen attributes, no state."""

    @abstractmethod
    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        """Widths of the outputs from widths of the inputs and shapes of the weights.

        Raises ConfigError where these contradict each other or the attributes.
        """

    @abstractmethod
    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        """The outputs, each [tokens, width]."""


def _require(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ConfigError(f"{what}: {found}, must be {expected}")


@dataclass(frozen=True)
class Input(Op):
    """Hidden states handed in by the caller (a block run on its own): -> [tokens, width]."""

    width: int

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        return (self.width,)

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        assert span.hidden is not None, "this graph begins with Input: hand in hidden states"
        return (span.hidden,)


@dataclass(frozen=True)
class Embed(Op):
    """tokens -> table[tokens] * scale. Weights: table [vocabulary, width]."""

    scale: float = 1.0

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        ((_vocabulary, width),) = weights
        return (width,)

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        (tokens,), (table,) = inputs, weights
        xp = array_namespace(table)
        rows = xp.take(table, xp.reshape(tokens, (-1,)), axis=0)  # [tokens, width]
        return (xp.reshape(rows, (*tokens.shape, table.shape[-1])) * self.scale,)


@dataclass(frozen=True)
class Norm(Op):
    """Root-mean-square or layer norm over each of `heads` equal parts of the width.

    x / sqrt(mean(x^2) + eps) * (weight + offset)   (rms; Zhang and Sennrich 2019)
    (x - mean) / sqrt(var + eps) * (weight + offset) + bias   (layer; Ba et al. 2016)
    Weights: weight [width / heads], and for `bias=True` bias [width / heads].
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    heads: int = 1
    offset: float = 0.0
    bias: bool = False

    @property
    def weight_count(self) -> int:
        return 1 + self.bias

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        (width,) = inputs
        _require("width modulo heads", width % self.heads, 0)
        _require("norm's weight shapes", weights, ((width // self.heads,),) * self.weight_count)
        return (width,)

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        (x,) = inputs
        xp = array_namespace(x)
        parts = xp.reshape(x, (*x.shape[:-1], self.heads, x.shape[-1] // self.heads))
        if self.kind == "layer":
            parts = parts - xp.mean(parts, axis=-1, keepdims=True)
        scale = 1.0 / xp.sqrt(xp.mean(parts * parts, axis=-1, keepdims=True) + self.eps)
        out = parts * scale * (weights[0] + self.offset)
        return (xp.reshape(out + weights[1] if self.bias else out, x.shape),)


@dataclass(frozen=True)
class Linear(Op):
    """x @ W.T + b. Weights: W [out, in], and for `bias=True` b [out]."""

    bias: bool = False

    @property
    def weight_count(self) -> int:
        return 1 + self.bias

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        (width,), out = inputs, weights[0][0]
        _require("linear's weight shapes", weights, ((out, width), (out,))[: self.weight_count])
        return (out,)

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        (x,) = inputs
        xp = array_namespace(x)
        out = xp.matmul(x, xp.matrix_transpose(weights[0]))  # [tokens, out]
        return (out + weights[1] if self.bias else out,)


@dataclass(frozen=True)
class Rope(Op):
    """Rotary positions on [tokens, heads * head_dim] (Su et al. 2021), halves paired as Hugging Face does.

    The first 2 * len(frequencies) of each head turn: pairs (i, i + n) by position * frequencies[i];
    cos and sin are multiplied by `factor` (yarn, longrope).
    """

    heads: int
    head_dim: int
    frequencies: tuple[float, ...]
    factor: float = 1.0

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        _require("rope's input width", inputs, (self.heads * self.head_dim,))
        if 2 * len(self.frequencies) > self.head_dim:
            raise ConfigError(f"rope turns {2 * len(self.frequencies)} of {self.head_dim} features of a head")
        return inputs

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        (x,) = inputs
        xp = array_namespace(x)
        n = len(self.frequencies)
        frequencies = xp.asarray(self.frequencies, dtype=x.dtype, device=device(x))
        angles = xp.astype(span.positions, x.dtype)[:, None] * frequencies[None, :]  # [tokens, n]
        cosine = (self.factor * xp.cos(angles))[:, None, :]  # [tokens, 1, n]
        sine = (self.factor * xp.sin(angles))[:, None, :]
        heads = xp.reshape(x, (*x.shape[:-1], self.heads, self.head_dim))
        first, second, rest = heads[..., :n], heads[..., n : 2 * n], heads[..., 2 * n :]
        turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
        return (xp.reshape(xp.concat(turned, axis=-1), x.shape),)


@dataclass(frozen=True)
class Attention(Op):
    """softmax(scale * q k^T, masked) v over the sequence's cache. Inputs q [tokens, heads * head_dim], k, v.

    `window` w: query i sees keys j with i - w < j <= i. `softcap` c: scores become c * tanh(scores / c).
    `layer` is the cache's slot. Query heads share key heads in groups of heads / kv_heads (Ainslie et al. 2023).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    layer: int
    window: int | None = None
    softcap: float | None = None
    causal: bool = True

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        _require("query heads modulo key heads", self.heads % self.kv_heads, 0)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        _require("attention's input widths", inputs, (q, kv, kv))
        return (q,)

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        xp = array_namespace(inputs[0])
        q, k, v = (self._split(x) for x in inputs)
        scores = xp.matmul(q, xp.matrix_transpose(k)) * self.scale  # [kv_heads, group, tokens, tokens]
        if self.softcap is not None:
            scores = self.softcap * xp.tanh(scores / self.softcap)
        query, key = span.positions[:, None], span.positions[None, :]
        seen = (key <= query) if self.causal else (key == key)  # [tokens, tokens]
        if self.window is not None:
            seen = seen & (key > query - self.window)
        scores = xp.where(seen, scores, xp.full_like(scores, -math.inf))
        out = xp.moveaxis(xp.matmul(softmax(scores), v), -2, -4)  # [tokens, kv_heads, group, head_dim]
        return (xp.reshape(out, inputs[0].shape),)

    def _split(self, x: Array) -> Array:
        """[tokens, n * head_dim] -> [kv_heads, n / kv_heads, tokens, head_dim]."""
        xp = array_namespace(x)
        group = x.shape[-1] // (self.kv_heads * self.head_dim)
        return xp.moveaxis(xp.reshape(x, (*x.shape[:-1], self.kv_heads, group, self.head_dim)), -4, -2)


class _Elementwise(Op):
    """Inputs of one width; an output of that width."""

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        _require("widths of an elementwise op's inputs", inputs, inputs[:1] * len(inputs))
        return inputs[:1]


@dataclass(frozen=True)
class Activation(_Elementwise):
    """Elementwise activation."""

    kind: ActivationKind

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        return (activate(self.kind, inputs[0]),)


@dataclass(frozen=True)
class Gate(_Elementwise):
    """activation(first) * second (Shazeer 2020)."""

    kind: ActivationKind

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        return (activate(self.kind, inputs[0]) * inputs[1],)


@dataclass(frozen=True)
class Add(_Elementwise):
    """first + second."""

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        return (inputs[0] + inputs[1],)


@dataclass(frozen=True)
class Multiply(_Elementwise):
    """first * factor, or first * second where two inputs are given (factor then 1)."""

    factor: float = 1.0

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        return (inputs[0] * (inputs[1] if len(inputs) == 2 else self.factor),)


@dataclass(frozen=True)
class Softcap(_Elementwise):
    """cap * tanh(x / cap)."""

    cap: float

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        return (self.cap * array_namespace(inputs[0]).tanh(inputs[0] / self.cap),)


@dataclass(frozen=True)
class SelectRows(_Elementwise):
    """The rows whose logits are wanted: [tokens, width] -> [rows, width]."""

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        (x,) = inputs
        return (x if span.rows is None else array_namespace(x).take(x, span.rows, axis=-2),)


# --- made by graph/fuse.py only; a formula is the composition of its parts


@dataclass(frozen=True)
class FusedLinear(Op):
    """Several linears over one input, with what stands around them.

    Inputs: x, and for `residual` the value added to the one output.
    Weights: the norm's, then for each part W and, where biases[i], b.
    Outputs: one a part; with `gate` there are two parts (gate, up) and one output activation(gate) * up.
    """

    norm: Norm | None
    biases: tuple[bool, ...]
    gate: ActivationKind | None = None
    residual: bool = False

    def parts(self) -> Iterator[tuple[Linear, slice]]:
        """Each part's linear and where its weights stand among the node's."""
        start = self.norm.weight_count if self.norm else 0
        for bias in self.biases:
            linear = Linear(bias)
            yield linear, slice(start, start + linear.weight_count)
            start += linear.weight_count

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        x = inputs[:1]
        if self.norm:
            x = self.norm.widths(x, weights[: self.norm.weight_count])
        out = tuple(linear.widths(x, weights[where])[0] for linear, where in self.parts())
        if self.gate:
            out = Gate(self.gate).widths(out, ())
        return Add().widths(out + inputs[1:], ()) if self.residual else out

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        x = inputs[:1]
        if self.norm:
            x = self.norm.formula(x, weights[: self.norm.weight_count], span)
        out = tuple(linear.formula(x, weights[where], span)[0] for linear, where in self.parts())
        if self.gate:
            out = Gate(self.gate).formula(out, (), span)
        return Add().formula(out + inputs[1:], (), span) if self.residual else out


@dataclass(frozen=True)
class FusedAttention(Op):
    """Per-head norms of q and k, rope, cache write and attention in one. Weights: q_norm's, then k_norm's.

    `rope` is the queries'; keys turn alike, with kv_heads heads.
    """

    attention: Attention
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rope: Rope | None = None

    def _stages(self) -> Iterator[tuple[int, Op, slice]]:
        """(input, op, its weights) in order of application."""
        start = 0
        for index, norm in enumerate((self.q_norm, self.k_norm)):
            if norm:
                yield index, norm, slice(start, start + norm.weight_count)
                start += norm.weight_count
        if self.rope:
            yield 0, self.rope, slice(0, 0)
            yield 1, replace(self.rope, heads=self.attention.kv_heads), slice(0, 0)

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        for index, op, where in self._stages():
            op.widths((inputs[index],), weights[where])
        return self.attention.widths(inputs, ())

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        values = list(inputs)
        for index, op, where in self._stages():
            (values[index],) = op.formula((values[index],), weights[where], span)
        return self.attention.formula(tuple(values), (), span)


@dataclass(frozen=True)
class FusedNorm(Op):
    """residual + norm(x). Inputs: x, residual."""

    norm: Norm

    def widths(self, inputs: Shape, weights: tuple[Shape, ...]) -> Shape:
        return Add().widths(self.norm.widths(inputs[:1], weights) + inputs[1:], ())

    def formula(self, inputs: Arrays, weights: Arrays, span: Span) -> Arrays:
        return Add().formula(self.norm.formula(inputs[:1], weights, span) + inputs[1:], (), span)
