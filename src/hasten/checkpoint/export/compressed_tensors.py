"""compressed-tensors, format pack-quantized: int4 and int8 with group scales, as vLLM, SGLang and transformers load it.

Layout: quantized/compressed_tensors.py. Levels and scales go over as they are; int3, int2 and int1 as int4. Embedding
and head are written as f16, since none of these programs takes them quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import formats
from hasten.checkpoint.expanded import without_dropped
from hasten.checkpoint.export import Options, Written
from hasten.checkpoint.grid import levels_of
from hasten.checkpoint.huggingface import by_source, full_shape
from hasten.checkpoint.model import Model, Progress
from hasten.checkpoint.plain import Stored, dense, refuse_reshaped, staged, write_config, write_tensors
from hasten.checkpoint.quantized.packed import pack, words
from hasten.checkpoint.write import check_output
from hasten.errors import CheckpointError
from hasten.formats.base import Weight
from hasten.formats.integer import Grouped
from hasten.graph.graph import WeightSpec

KIND = "a directory of compressed-tensors (pack-quantized)"
TAKES = ()
BITS = {"int8": 8, "int4": 4, "int3": 4, "int2": 4, "int1": 4}
DENSE = ("f32", "f16", "bf16")
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Scheme:
    bits: int
    group: int

    def fields(self) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
            "observer_kwargs": {},
            "block_structure": None,
        }


def write(model: Model, out: Path, options: Options, progress: Progress | None) -> Written:
    model = without_dropped(model)
    refuse_reshaped(model, "compressed-tensors")
    check_output(out)
    sources = by_source(model.graph)
    schemes = plan(model, sources)
    stored: dict[str, Stored] = {}
    for source, specs in sources.items():
        if source in schemes:
            stored |= _packed(model, source, specs, schemes[source])
        else:
            dtype = "f16" if specs[0].is_matrix else "f32"
            stored[source] = dense(source, specs, lambda spec: model.tensor(spec.name), dtype)
    with staged(out) as staging:
        fields = {"torch_dtype": "float16", "quantization_config": quantization(model, sources, schemes)}
        write_config(staging, model, fields)
        write_tensors(staging / "model.safetensors", stored, progress)
    types = {
        spec.name: f"int{schemes[source].bits}-g{schemes[source].group}" if source in schemes else "f16"
        for source, specs in sources.items()
        for spec in specs
        if spec.is_matrix
    }
    return Written(out, types, tuple(_notes(model, sources, schemes)))


def plan(model: Model, sources: dict[str, list[WeightSpec]]) -> dict[str, Scheme]:
    """Quantised tensors of the checkpoint and their schemes. Raises CheckpointError for what has no place there."""
    inside = {w for block in model.graph.blocks for n in model.graph.nodes[block.start : block.stop] for w in n.weights}
    made: dict[str, Scheme] = {}
    for source, specs in sources.items():
        if not specs[0].is_matrix or specs[0].name not in inside:
            continue
        found = {model.formats[spec.name] for spec in specs}
        if found <= set(DENSE):
            continue
        schemes = {_scheme(model, spec) for spec in specs}
        if len(schemes) > 1:
            raise CheckpointError(
                f"'{source}' is one tensor there, its parts are stored as {' and '.join(sorted(found))} here",
                "compress its parts alike, or --to hf, gguf or onnx",
            )
        made[source] = schemes.pop()
    if not made:
        raise CheckpointError(
            f"{model.source} holds no int4 or int8 matrix in its blocks, so there is nothing to write compressed",
            "run `hasten compress` first, or --to hf",
        )
    return made


def _scheme(model: Model, spec: WeightSpec) -> Scheme:
    format = formats.get(model.formats[spec.name])
    way_out = "--to gguf or onnx holds it exactly, --to hf dequantised"
    if format.kind not in BITS:
        raise CheckpointError(f"'{spec.name}' is {format.name}, which compressed-tensors has no place for", way_out)
    if spec.shape[1] % format.group:
        raise CheckpointError(
            f"'{spec.name}' has {spec.shape[1]} columns, no multiple of its group of {format.group}: "
            "compressed-tensors has no ragged groups",
            way_out,
        )
    return Scheme(BITS[format.kind], format.group)


def quantization(model: Model, sources: dict[str, list[WeightSpec]], schemes: dict[str, Scheme]) -> dict[str, Any]:
    """What config.json says of the weights."""
    kept = [s.removesuffix(".weight") for s, specs in sources.items() if s not in schemes and specs[0].is_matrix]
    ignored = [name for name in kept if "embed" not in name]
    distinct = sorted(set(schemes.values()), key=lambda s: (s.bits, s.group))
    groups = {}
    for number, scheme in enumerate(distinct):
        own = [s.removesuffix(".weight") for s in schemes if schemes[s] == scheme]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(distinct) == 1 else own,
            "weights": scheme.fields(),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*ignored, "lm_head"}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _packed(model: Model, source: str, specs: list[WeightSpec], scheme: Scheme) -> dict[str, Stored]:
    stem = source.removesuffix("weight")
    rows, columns = full_shape(specs)
    codes, groups = words(columns, scheme.bits), columns // scheme.group
    return {
        f"{stem}weight_packed": Stored(
            "I32", (rows, codes), 4 * rows * codes, partial(_each, model, specs, partial(_codes, bits=scheme.bits))
        ),
        f"{stem}weight_scale": Stored("F16", (rows, groups), 2 * rows * groups, partial(_each, model, specs, _scales)),
        f"{stem}weight_shape": Stored("I64", (2,), 16, lambda: [np.array([rows, columns], "<i8")]),
    }


def _each(model: Model, specs: list[WeightSpec], part: Any) -> Iterator[npt.NDArray[Any]]:
    for spec in specs:
        weight = model.weight(spec.name)
        assert isinstance(weight, Weight)
        yield part(weight)


def _codes(weight: Weight, bits: int) -> npt.NDArray[np.int32]:
    levels, _ = levels_of(weight)
    return pack((levels.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8), bits)


def _scales(weight: Weight) -> npt.NDArray[np.float16]:
    assert isinstance(weight.format, Grouped), weight.format.name
    return weight.format.scales(weight).astype("<f2")


def _notes(model: Model, sources: dict[str, list[WeightSpec]], schemes: dict[str, Scheme]) -> Iterator[str]:
    left = [s.name for source, specs in sources.items() if source not in schemes for s in specs if s.is_matrix]
    rounded = [name for name in left if model.formats[name] not in DENSE]
    if rounded:
        yield f"{', '.join(rounded)} rounded to f16: programs that load this format take embedding and head dense"
    for parts in JOINED:
        stems = [source for source in sources if source.endswith(f"{parts[0]}.weight")]
        for stem in stems:
            found = {schemes.get(stem.replace(parts[0], part)) for part in parts}
            if len(found) > 1:
                where = stem.removesuffix(f".{parts[0]}.weight")
                yield f"{where}: {', '.join(parts)} differ in format; vLLM and SGLang join them and need them alike"
                break
    if not (model.path / "tokenizer.json").exists():
        yield "the model has no tokenizer.json: none was written"
