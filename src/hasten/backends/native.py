"""The native CPU backend: fuses and plans a graph, hands it to the C++ core, and runs steps with the GIL released."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.backends import blocking
from hasten.backends import cache as kv
from hasten.backends.batch import Batch, Float32, Int32, Limits, Outputs, Sampled, SamplingBatch
from hasten.errors import BackendError, ContextError, InputError, MemoryLimitError
from hasten.formats.base import Weight
from hasten.graph import ops
from hasten.graph.fuse import fuse
from hasten.graph.graph import Graph, Node
from hasten.graph.memory import plan

Weights = Mapping[str, "Weight | Float32"]


def compile(
    graph: Graph, weights: Weights, limits: Limits, keep: Iterable[str] = (), isa: str = "", tune: bool = False
) -> NativeProgram:
    """`graph`, unfused, as a program with a KV cache of its own.

    `weights` has a packed Weight for every matrix and a float32 array for every vector; none is copied, all are kept
    alive. `keep` names values that stay readable through `Outputs.value`. `isa` forces an instruction set ("": the
    best, or what HASTEN_ISA says). `tune`: its first steps find out how work is best cut here, unless an earlier
    process did; the bits are the same. Raises ContextError where limits.context is longer than the graph's,
    MemoryLimitError where the buffers cannot be had, BackendError for all else that does not fit.
    """
    keep = tuple(keep)
    if limits.context > graph.context:
        raise ContextError(f"context of {limits.context} tokens asked for; the model's is {graph.context}")
    known = {value for node in graph.nodes for value in node.outputs}
    if missing := sorted(set(keep) - known):
        raise BackendError(f"no value '{missing[0]}' in this graph to keep")
    fused = fuse(graph, keep)
    try:
        return NativeProgram(_Planner(fused, weights, limits, keep, isa), limits, tune)
    except MemoryError:
        raise MemoryLimitError(
            f"no memory for a cache of {limits.kv_blocks} blocks of {limits.block_size} tokens and buffers for "
            f"{limits.max_tokens} tokens a step",
            "lower the context, the batch size or the tokens a step",
        ) from None
    except ValueError as error:
        raise BackendError(str(error)) from None


@dataclass(frozen=True)
class Recording:
    """When the threads were where in the recorded steps: nanoseconds of `_native.clock_ns()`, 0 for what never was."""

    marks: npt.NDArray[
        np.int64
    ]  # [runs, threads, plan steps + 2] it has entered; rope is ready; each plan step is over
    waits: npt.NDArray[np.int64]  # [runs, threads, n, 2] it began and ended to wait for the others


class NativeProgram:
    """A compiled graph with its weights and cache; one step at a time."""

    def __init__(self, planner: _Planner, limits: Limits, tune: bool) -> None:
        self.limits = limits
        self._native = planner.program
        self._values = planner.readable
        self._output = planner.graph.output
        self.graph = planner.graph
        """The fused graph."""
        self.plan = tuple(planner.steps)
        """Of each plan step, the node of the fused graph that it computes."""
        self._weight_bytes = planner.weight_bytes
        self._steps = 0
        self.threads: int = self._native.threads
        self.isa: str = self._native.isa
        if tune:
            blocking.recall(self._native)
            self._native.tune(True)
            weakref.finalize(self, blocking.keep, self._native)  # when it goes, or the process ends

    def step(self, batch: Batch) -> NativeOutputs:
        """Run `batch`. Raises ContextError for a position past the context and InputError for every other bad batch."""
        try:
            self._native.step(batch.tokens, batch.positions, batch.starts, batch.block_tables, batch.rows, batch.hidden)
        except _native.ContextLimitError as error:
            raise ContextError(str(error)) from None
        except _native.BatchError as error:
            raise InputError(str(error)) from None
        except TypeError:
            raise InputError(_misfit(batch, _BATCH)) from None
        self._steps += 1
        return NativeOutputs(self, self._steps)

    def record(self, runs: int) -> None:
        """Record the next `runs` steps, 0 to end it. What was recorded before is gone; no result's bits change.

        Raises BackendError for a number that cannot be, MemoryLimitError where there is no room for so many.
        """
        try:
            self._native.record(runs)
        except MemoryError:
            raise MemoryLimitError(f"no memory to record {runs} steps", "record fewer steps") from None
        except ValueError as error:
            raise BackendError(str(error)) from None

    def recording(self) -> Recording:
        """The steps recorded so far."""
        rows, length = self._native.recorded()
        flat = np.empty((rows, length), np.int64)
        self._native.copy_recording(flat)
        runs, marks = rows // self.threads, len(self.plan) + 2
        pairs = max(length - marks, 0) // 2
        flat = flat.reshape(runs, self.threads, length)
        waits = flat[..., marks : marks + 2 * pairs].reshape(runs, self.threads, pairs, 2)
        return Recording(flat[..., :marks], waits)

    def settle(self, run: Callable[[], object], most: int = 40) -> None:
        """Call `run`, which steps, until how its work is cut is chosen: once where that is known or not asked for."""
        run()
        for _ in range(most - 1):
            if not self._native.tuning:
                return
            run()

    def memory(self) -> dict[str, int]:
        """Bytes of weights, KV cache and buffers, as allocated; pages of the latter two count once they are used."""
        return {
            "weights": self._weight_bytes,
            "kv_cache": self._native.kv_bytes,
            "buffers": self._native.buffer_bytes,
        }


class NativeOutputs:
    """A step's results, read where they lie until the program's next step."""

    def __init__(self, program: NativeProgram, step: int) -> None:
        self._owner = program
        self._step = step

    @property
    def _program(self) -> NativeProgram:
        if self._owner._steps != self._step:
            raise BackendError("these outputs are gone: their program has taken another step")
        return self._owner

    def logits(self) -> Float32:
        """The graph's output [rows, vocabulary], a copy."""
        return self.value(self._program._output)

    def score(self, targets: Int32) -> Float32:
        """[rows] log-probability of each row's target. Raises InputError for targets outside the vocabulary."""
        program = self._program
        out = np.empty(program._native.output_rows, np.float32)
        try:
            program._native.score(targets, out)
        except _native.BatchError as error:
            raise InputError(str(error)) from None
        except TypeError:
            raise InputError("targets must be a contiguous int32 array [rows]") from None
        return out

    def argmax(self) -> Int32:
        """[rows] token of the largest logit, the lowest among equals."""
        program = self._program
        out = np.empty(program._native.output_rows, np.int32)
        program._native.argmax(out)
        return out

    def divergence(self, reference: Outputs) -> npt.NDArray[np.float64]:
        """[rows] KL(reference || this) over the whole vocabulary, in nats."""
        program = self._program
        if not isinstance(reference, NativeOutputs):
            raise BackendError("divergence compares outputs of two native programs")
        out = np.empty(program._native.output_rows, np.float64)
        try:
            program._native.divergence(reference._program._native, out)
        except _native.BatchError as error:
            raise InputError(str(error)) from None
        return out

    def sample(self, sampling: SamplingBatch) -> Sampled:
        """Draw each row's token. Raises InputError where `sampling` does not fit the step."""
        program, s = self._program, sampling
        rows = program._native.output_rows
        out = Sampled(
            tokens=np.empty(rows, np.int32),
            logprobs=np.empty(rows, np.float32),
            top_tokens=np.empty((rows, s.logprobs), np.int32),
            top_logprobs=np.empty((rows, s.logprobs), np.float32),
        )
        try:
            program._native.sample(
                *(s.temperature, s.top_k, s.top_p, s.min_p, s.typical_p, s.repetition, s.presence, s.frequency),
                *(s.seed, s.position, s.history, s.prompt_length, s.bias_tokens, s.bias, s.banned, s.allowed),
                *(out.tokens, out.logprobs, out.top_tokens, out.top_logprobs),
            )
        except _native.BatchError as error:
            raise InputError(str(error)) from None
        except TypeError:
            raise InputError(_misfit(sampling, _SAMPLING)) from None
        return out

    def value(self, name: str) -> Float32:
        """A kept value [tokens or rows, width], a copy."""
        program = self._program
        if name not in program._values:
            raise BackendError(f"value '{name}' was not kept", "name it in compile(..., keep=...)")
        index, width = program._values[name]
        out = np.empty((program._native.rows_of(index), width), np.float32)
        program._native.copy_value(index, out)
        return out


_BATCH = {"tokens": "i4", "positions": "i4", "starts": "i4", "block_tables": "i4", "rows": "i4", "hidden": "f4"}
_SAMPLING = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition", "presence", "frequency"), "f4"),
    **dict.fromkeys(("top_k", "prompt_length"), "i4"),
    "seed": "u8",
    "position": "i8",
}


def _misfit(given: Batch | SamplingBatch, fields: dict[str, str]) -> str:
    """Which array of `given` the core cannot read, and what it must be."""
    for name, dtype in fields.items():
        array, dimensions = getattr(given, name), 2 if name in ("block_tables", "hidden") else 1
        if array is None and name in ("hidden", "typical_p"):
            continue
        wanted = f"must be a contiguous {np.dtype(dtype).name} array with {dimensions} axes"
        if not isinstance(array, np.ndarray):
            return f"{name} is of type {type(array).__name__}, {wanted}"
        if array.dtype != dtype or array.ndim != dimensions or not array.flags.c_contiguous:
            strided = "" if array.flags.c_contiguous else "strided "
            return f"{name} is {strided}{array.dtype}{list(array.shape)}, {wanted}"
    return (
        "history, bias_tokens and banned must be lists of contiguous int32 arrays, one a row; bias of float32, "
        "allowed of uint32"
    )


class _Planner:
    """Builds the native program of a fused graph, node by node."""

    def __init__(self, graph: Graph, weights: Weights, limits: Limits, keep: tuple[str, ...], isa: str) -> None:
        self.graph, self.weights = graph, weights
        self.program = _native.Program(
            isa,
            limits.context,
            limits.max_tokens,
            limits.max_sequences,
            limits.max_rows,
            limits.block_size,
            limits.kv_blocks,
            limits.threads,
        )
        self._cache = kv.formats_of(graph, limits.kv_format)
        self._arrays: dict[int, int] = {}
        self.steps: list[Node] = []
        buffers = plan(graph, limits.max_tokens, limits.max_rows, keep)
        self.widths, selected = graph.widths(), graph.row_values()
        self.values = {
            name: self.program.value(offset, self.widths[name], name in selected)
            for name, offset in buffers.offsets.items()
        }
        for node in graph.nodes:
            self._add(node)
            self.steps += [node] * (self.program.step_count - len(self.steps))
        self.program.finish(buffers.total, self.values[graph.output])
        self.readable = {name: (self.values[name], self.widths[name]) for name in {*keep, graph.output}}

    @property
    def weight_bytes(self) -> int:
        return sum(self._arrays.values())

    def _add(self, node: Node) -> None:
        inputs = [self.values.get(v) for v in node.inputs]
        out = self.values[node.outputs[0]]
        match node.op:
            case ops.Embed(scale=scale):
                self.program.embed(self._matrix(node.weights[0]), scale, out)
            case ops.Input():
                self.program.input(out)
            case ops.SelectRows():
                self.program.select(*inputs, out)
            case ops.Norm() as norm:
                self.program.norm(self._norm(norm, iter(node.weights)), inputs[0], None, out)
            case ops.FusedNorm(norm=norm):
                self.program.norm(self._norm(norm, iter(node.weights)), *inputs, out)
            case ops.Rope() as rope:
                self.program.rope(_rotation(rope), rope.heads, rope.head_dim, *inputs, out)
            case ops.Linear(bias=bias):
                self._linear(ops.FusedLinear(None, (bias,)), node)
            case ops.FusedLinear() as linear:
                self._linear(linear, node)
            case ops.Attention() as attention:
                self._attention(ops.FusedAttention(attention), node)
            case ops.FusedAttention() as fused:
                self._attention(fused, node)
            case _:
                self.program.elementwise(*_elementwise(node.op, len(inputs)), inputs[0], [*inputs, None][1], out)

    def _linear(self, op: ops.FusedLinear, node: Node) -> None:
        names = iter(node.weights)
        norm = self._norm(op.norm, names) if op.norm else None
        parts = [(self._matrix(next(names)), self._vector(next(names)) if bias else None) for bias in op.biases]
        inputs = [self.values[v] for v in node.inputs]
        self.program.linear(
            inputs[0],
            norm,
            [matrix for matrix, _ in parts],
            [bias for _, bias in parts],
            [self.values[v] for v in node.outputs],
            op.gate or "",
            inputs[1] if op.residual else None,
        )

    def _attention(self, op: ops.FusedAttention, node: Node) -> None:
        names, a = iter(node.weights), op.attention
        q_norm = self._norm(op.q_norm, names) if op.q_norm else None
        k_norm = self._norm(op.k_norm, names) if op.k_norm else None
        rope = _rotation(op.rope) if op.rope else None
        cache = (a.layer, self._cache[a.layer])
        sizes = (a.heads, a.kv_heads, a.head_dim, a.scale, *cache, a.window or 0, a.softcap or 0.0, a.causal)
        values = (self.values[v] for v in (*node.inputs, node.outputs[0]))
        self.program.attention(*sizes, q_norm, k_norm, rope, *values)

    def _norm(self, op: ops.Norm, names: Iterator[str]) -> Any:
        weight = self._vector(next(names))
        bias = self._vector(next(names)) if op.bias else None
        return _native.Norm(op.kind, op.heads, weight + np.float32(op.offset) if op.offset else weight, bias, op.eps)

    def _given(self, name: str) -> Weight | Float32:
        if name not in self.weights:
            raise BackendError(f"weight '{name}' is missing")
        found, expected = self.weights[name], self.graph.weights[name].shape
        if tuple(found.shape) != expected:
            raise BackendError(f"weight '{name}' is {list(found.shape)}, the graph's is {list(expected)}")
        for array in found.arrays.values() if isinstance(found, Weight) else (found,):
            self._arrays[id(array)] = array.nbytes
        return found

    def _matrix(self, name: str) -> Any:
        weight = self._given(name)
        if not isinstance(weight, Weight):
            raise BackendError(f"matrix '{name}' is a plain array", "pack it with a weight format")
        rows, columns = weight.shape
        arrays = [weight.arrays.get(part) for part in ("codes", "scales", "codebook")]
        try:
            return _native.Weight(weight.format.kind, rows, columns, weight.format.group, *arrays)
        except (ValueError, TypeError) as error:
            raise BackendError(f"weight '{name}' ({weight.format.name}): {error}") from None

    def _vector(self, name: str) -> Float32:
        weight = self._given(name)
        if isinstance(weight, Weight):
            raise BackendError(f"vector '{name}' is packed, must be a float32 array")
        return np.ascontiguousarray(weight, dtype=np.float32)


def _rotation(rope: ops.Rope) -> Any:
    return _native.Rotation(list(rope.frequencies), rope.factor)


def _elementwise(op: ops.Op, inputs: int) -> tuple[str, str, float]:
    """(name, activation, factor) of an elementwise op."""
    match op:
        case ops.Activation(kind=kind):
            return "activation", kind, 1.0
        case ops.Gate(kind=kind):
            return "gate", kind, 1.0
        case ops.Add():
            return "add", "", 1.0
        case ops.Multiply(factor=factor):
            return ("multiply", "", 1.0) if inputs == 2 else ("scale", "", factor)
        case ops.Softcap(cap=cap):
            return "softcap", "", cap
    raise BackendError(f"the native backend has no op {type(op).__name__}")
