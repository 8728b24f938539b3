"""Ops of the graph as ops of ONNX (opset 21): a function each, its formula over [batch, sequence, width]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import CheckpointError
from hasten.graph import ops
from hasten.graph.functions import ActivationKind

OPSET = 21
TOKENS = "input_ids"


class Writer:
    """Collects nodes and constants. A method returns the name of the value it makes; values are float32."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._known: dict[Any, str] = {}

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], f"{kind}_{len(self.nodes)}", **attributes))
        return name

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """The value that `make` makes the first time it is asked for by `key`."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def constant(self, values: Any, dtype: npt.DTypeLike = np.float32) -> str:
        from onnx import numpy_helper

        array = np.asarray(values, dtype)

        def make() -> str:
            name = f"c{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, name))
            return name

        return self.once((array.dtype.str, array.shape, array.tobytes()), make)

    # --- what ops share

    def sequence(self) -> str:
        """How many tokens: int64, a scalar."""

        def make() -> str:
            return self.add("Gather", self.add("Shape", TOKENS), self.constant(1, np.int64), axis=0)

        return self.once("sequence", make)

    def positions(self) -> str:
        """0, 1, 2 ...: int64 [sequence]."""
        zero, one = self.constant(0, np.int64), self.constant(1, np.int64)
        return self.once("positions", lambda: self.add("Range", zero, self.sequence(), one))

    def reshape(self, x: str, *shape: int) -> str:
        """0: as it was."""
        return self.add("Reshape", x, self.constant(shape, np.int64))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.add("Unsqueeze", x, self.constant(axes, np.int64))

    def slice(self, x: str, first: int, last: int) -> str:
        """Along the last axis."""
        return self.add("Slice", x, *(self.constant([n], np.int64) for n in (first, last, -1)))

    def seen(self, op: ops.Attention) -> str:
        """Which keys each query sees: bool [sequence, sequence]."""

        def make() -> str:
            query, key = self.unsqueeze(self.positions(), 1), self.unsqueeze(self.positions(), 0)
            found = self.add("LessOrEqual", key, query) if op.causal else self.add("Equal", key, key)
            if op.window is not None:
                first = self.add("Sub", query, self.constant(op.window, np.int64))
                found = self.add("And", found, self.add("Greater", key, first))
            return found

        return self.once(("seen", op.causal, op.window), make)

    def turns(self, op: ops.Rope, function: str) -> str:
        """Cos or Sin of each position's angles, times the factor: [sequence, 1, frequencies]."""

        def make() -> str:
            positions = self.unsqueeze(self.add("Cast", self.positions(), to=1), 1)
            angles = self.add("Mul", positions, self.constant(op.frequencies))
            found = self.add(function, angles)
            if op.factor != 1.0:
                found = self.add("Mul", found, self.constant(op.factor))
            return self.unsqueeze(found, 1)

        return self.once((function, op.frequencies, op.factor), make)


def embed(w: Writer, op: ops.Embed, inputs: list[str], weights: list[str]) -> str:
    rows = w.add("Gather", weights[0], inputs[0], axis=0)
    return rows if op.scale == 1.0 else w.add("Mul", rows, w.constant(op.scale))


def norm(w: Writer, op: ops.Norm, inputs: list[str], weights: list[str]) -> str:
    x = inputs[0] if op.heads == 1 else w.reshape(inputs[0], 0, 0, op.heads, -1)
    last = w.constant([-1], np.int64)
    if op.kind == "layer":
        x = w.add("Sub", x, w.add("ReduceMean", x, last))
    mean = w.add("ReduceMean", w.add("Mul", x, x), last)
    x = w.add("Div", x, w.add("Sqrt", w.add("Add", mean, w.constant(op.eps))))
    scale = weights[0] if op.offset == 0 else w.add("Add", weights[0], w.constant(op.offset))
    x = w.add("Mul", x, scale)
    if op.bias:
        x = w.add("Add", x, weights[1])
    return x if op.heads == 1 else w.reshape(x, 0, 0, -1)


def linear(w: Writer, op: ops.Linear, inputs: list[str], weights: list[str]) -> str:
    across = w.once(("transposed", weights[0]), lambda: w.add("Transpose", weights[0], perm=[1, 0]))
    x = w.add("MatMul", inputs[0], across)
    return w.add("Add", x, weights[1]) if op.bias else x


def rope(w: Writer, op: ops.Rope, inputs: list[str], weights: list[str]) -> str:
    n, x = len(op.frequencies), w.reshape(inputs[0], 0, 0, op.heads, op.head_dim)
    cosine, sine = w.turns(op, "Cos"), w.turns(op, "Sin")
    first, second = w.slice(x, 0, n), w.slice(x, n, 2 * n)
    turned = [
        w.add("Sub", w.add("Mul", first, cosine), w.add("Mul", second, sine)),
        w.add("Add", w.add("Mul", second, cosine), w.add("Mul", first, sine)),
    ]
    rest = [w.slice(x, 2 * n, op.head_dim)] if 2 * n < op.head_dim else []
    return w.reshape(w.add("Concat", *turned, *rest, axis=-1), 0, 0, op.heads * op.head_dim)


def attention(w: Writer, op: ops.Attention, inputs: list[str], weights: list[str]) -> str:
    group = op.heads // op.kv_heads

    def heads(x: str, count: int, perm: list[int]) -> str:
        """[batch, sequence, kv_heads * count * head_dim] -> [batch, kv_heads, count, ...]."""
        split = w.add("Reshape", x, w.constant([0, 0, op.kv_heads, count, op.head_dim], np.int64))
        return w.add("Transpose", split, perm=perm)

    q = heads(inputs[0], group, [0, 2, 3, 1, 4])  # [batch, kv_heads, group, sequence, head_dim]
    k = heads(inputs[1], 1, [0, 2, 3, 4, 1])  # [batch, kv_heads, 1, head_dim, sequence]
    v = heads(inputs[2], 1, [0, 2, 3, 1, 4])
    scores = w.add("Mul", w.add("MatMul", q, k), w.constant(op.scale))
    if op.softcap is not None:
        scores = _capped(w, scores, op.softcap)
    scores = w.add("Where", w.seen(op), scores, w.constant(-math.inf))
    out = w.add("MatMul", w.add("Softmax", scores, axis=-1), v)
    return w.reshape(w.add("Transpose", out, perm=[0, 3, 1, 2, 4]), 0, 0, op.heads * op.head_dim)


def _capped(w: Writer, x: str, cap: float) -> str:
    return w.add("Mul", w.add("Tanh", w.add("Div", x, w.constant(cap))), w.constant(cap))


def activate(w: Writer, kind: ActivationKind, x: str) -> str:
    match kind:
        case "silu":
            return w.add("Mul", x, w.add("Sigmoid", x))
        case "gelu":
            return w.add("Gelu", x)
        case "gelu_tanh":
            return w.add("Gelu", x, approximate="tanh")
    return w.add({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[kind], x)


def activation(w: Writer, op: ops.Activation, inputs: list[str], weights: list[str]) -> str:
    return activate(w, op.kind, inputs[0])


def gate(w: Writer, op: ops.Gate, inputs: list[str], weights: list[str]) -> str:
    return w.add("Mul", activate(w, op.kind, inputs[0]), inputs[1])


def add(w: Writer, op: ops.Add, inputs: list[str], weights: list[str]) -> str:
    return w.add("Add", *inputs)


def multiply(w: Writer, op: ops.Multiply, inputs: list[str], weights: list[str]) -> str:
    return w.add("Mul", inputs[0], inputs[1] if len(inputs) == 2 else w.constant(op.factor))


def softcap(w: Writer, op: ops.Softcap, inputs: list[str], weights: list[str]) -> str:
    return _capped(w, inputs[0], op.cap)


def select_rows(w: Writer, op: ops.SelectRows, inputs: list[str], weights: list[str]) -> str:
    return inputs[0]  # logits of all tokens are handed out


TRANSLATIONS: dict[type, Callable[..., str]] = {
    ops.Embed: embed,
    ops.Norm: norm,
    ops.Linear: linear,
    ops.Rope: rope,
    ops.Attention: attention,
    ops.Activation: activation,
    ops.Gate: gate,
    ops.Add: add,
    ops.Multiply: multiply,
    ops.Softcap: softcap,
    ops.SelectRows: select_rows,
}


def translation(op: ops.Op) -> Callable[..., str]:
    """Raises CheckpointError for an op that has no translation."""
    found = TRANSLATIONS.get(type(op))
    if found is None:
        raise CheckpointError(f"the op {type(op).__name__} cannot be written as ONNX", "--to hf writes the weights")
    return found
