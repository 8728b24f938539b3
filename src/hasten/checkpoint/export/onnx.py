"""An ONNX graph of plain ops (opset 21), op by op from the model's own, so that every architecture can be written.

model.onnx takes input_ids int64 [batch, sequence] and gives logits float32 [batch, sequence, vocabulary]: a whole
sequence at a time, causal, without cache and without padding. Weights lie in model.onnx.data, as they are: dense ones
in their type, quantised ones as int4 or int8 levels that DequantizeLinear multiplies by their scales, exactly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten import formats
from hasten.checkpoint.export import Options, Written
from hasten.checkpoint.export._onnx_ops import OPSET, TOKENS, Writer, translation
from hasten.checkpoint.grid import levels_of
from hasten.checkpoint.model import Model, Progress
from hasten.checkpoint.plain import rounded, staged, write_config
from hasten.checkpoint.write import check_output
from hasten.errors import DependencyError
from hasten.formats.base import Weight
from hasten.formats.integer import Grouped
from hasten.graph import graph as graphs

KIND = "a directory with an ONNX graph and its weights"
TAKES = ()
GRAPH, DATA = "model.onnx", "model.onnx.data"
ALIGNMENT = 64
FLOAT, INT8, FLOAT16, BFLOAT16, INT4 = 1, 3, 10, 16, 22
DENSE = {"f32": FLOAT, "f16": FLOAT16, "bf16": BFLOAT16}
IR_VERSION = 10
"""The first with opset 21, so that older runtimes read it."""


@dataclass(frozen=True)
class Part:
    """An array of the data file: what ONNX calls its type, its shape, its bytes."""

    type: int
    shape: tuple[int, ...]
    data: npt.NDArray[Any]


def write(model: Model, out: Path, options: Options, progress: Progress | None) -> Written:
    try:
        import onnx
        from onnx import helper
    except ImportError:
        raise DependencyError("onnx is not installed", "pip install 'hasten[export]'") from None
    check_output(out)
    for node in model.graph.nodes:
        translation(node.op)
    writer, stored = Writer(), model.formats
    with staged(out) as staging:
        tensors: list[Any] = []
        made: dict[str, str] = {}
        with open(staging / DATA, "wb") as file:
            for done, (name, spec) in enumerate(model.graph.weights.items()):
                if progress is not None:
                    progress(f"writing {DATA}", done, len(model.graph.weights))
                format = stored.get(name, "f32")
                parts = dict(_parts(name, format, model))
                tensors += [_put(file, part_name, part) for part_name, part in parts.items()]
                made[name] = _value(writer, name, parts, spec)
            file.flush()
            os.fsync(file.fileno())
        last = _nodes(writer, model.graph, made)
        writer.nodes.append(helper.make_node("Identity", [last], ["logits"], "logits"))
        shape = ["batch", "sequence"]
        graph = helper.make_graph(
            writer.nodes,
            "hasten",
            [helper.make_tensor_value_info(TOKENS, onnx.TensorProto.INT64, shape)],
            [helper.make_tensor_value_info("logits", FLOAT, [*shape, model.graph.vocabulary])],
            [*writer.constants, *tensors],
        )
        document = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="hasten")
        document.ir_version = IR_VERSION
        (staging / GRAPH).write_bytes(document.SerializeToString())
        write_config(staging, model, {"torch_dtype": "float32"})
    return Written(out, {name: _shown(model, name) for name in stored})


def _nodes(writer: Writer, graph: graphs.Graph, weights: dict[str, str]) -> str:
    """Every node of the graph, in order; the name of its output."""
    values = {graphs.TOKENS: TOKENS}
    for node in graph.nodes:
        inputs = [values[v] for v in node.inputs]
        values[node.outputs[0]] = translation(node.op)(writer, node.op, inputs, [weights[w] for w in node.weights])
    return values[graph.output]


def _kept(model: Model, name: str) -> str | None:
    """ "int4" or "int8" where a matrix is written as levels and scales; None for dense ones, and ragged groups."""
    format = formats.get(model.formats[name])
    if not isinstance(format, Grouped) or model.graph.weights[name].shape[1] % format.group:
        return None
    return "int4" if format.kind in ("int4", "int3", "int2", "int1") else "int8"


def _shown(model: Model, name: str) -> str:
    format = model.formats[name]
    return _kept(model, name) or (format if format in DENSE else "f32")


def _parts(name: str, format: str, model: Model) -> Iterator[tuple[str, Part]]:
    kept = _kept(model, name) if name in model.formats else None
    if kept is None:
        dtype = format if format in DENSE else "f32"
        values = rounded(model.tensor(name), dtype, name)
        yield name, Part(DENSE[dtype], values.shape, values)
        return
    weight = model.weight(name)
    assert isinstance(weight, Weight)
    levels, scales = levels_of(weight)
    if kept == "int4":
        flat = levels.reshape(-1)  # an even number, as groups are
        packed = (flat[::2] & np.int8(15)).view(np.uint8) | (flat[1::2] & np.int8(15)).view(np.uint8) << np.uint8(4)
        yield f"{name}.levels", Part(INT4, levels.shape, packed)
    else:
        yield f"{name}.levels", Part(INT8, levels.shape, levels)
    yield f"{name}.scales", Part(FLOAT16, scales.shape, scales.astype("<f2"))


def _put(file: BinaryIO, name: str, part: Part) -> Any:
    """Append an array to the data file; the initializer that points at it."""
    from onnx import TensorProto

    file.write(b"\0" * (-file.tell() % ALIGNMENT))
    offset, data = file.tell(), np.ascontiguousarray(part.data)
    file.write(data.data)
    made = TensorProto(name=name, data_type=part.type, dims=part.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", str(offset)), ("length", str(data.nbytes))):
        made.external_data.add(key=key, value=value)
    return made


def _value(writer: Writer, name: str, parts: dict[str, Part], spec: graphs.WeightSpec) -> str:
    """The weight as a float32 value of the ONNX graph."""
    if name in parts:
        return name if parts[name].type == FLOAT else writer.add("Cast", name, to=FLOAT)
    scales = writer.add("Cast", f"{name}.scales", to=FLOAT)
    group = spec.shape[1] // parts[f"{name}.scales"].shape[1]
    return writer.add("DequantizeLinear", f"{name}.levels", scales, axis=1, block_size=group)
