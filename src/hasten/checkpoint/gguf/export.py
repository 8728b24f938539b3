"""A model as a GGUF file: llama.cpp's names and key-values, and rows of q and k in the order its rope wants."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten import formats
from hasten.checkpoint.gguf import container
from hasten.checkpoint.gguf.blocks import KINDS, Kind, UInt8, encode, encode_levels
from hasten.checkpoint.gguf.vocabulary import vocabulary
from hasten.checkpoint.grid import levels_of
from hasten.errors import CheckpointError
from hasten.formats.base import Float32, Weight
from hasten.formats.integer import Grouped
from hasten.graph.graph import Graph, WeightSpec
from hasten.graph.ops import Attention, Gate, Norm, Rope

if TYPE_CHECKING:
    from hasten.checkpoint.model import Model

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> llama.cpp's name. Under its "llama", rope turns neighbouring features: q and k rows are permuted."""
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EXACT = {"f32": "f32", "f16": "f16", "bf16": "bf16", **dict.fromkeys(("int4", "int3", "int2", "int1"), "q4_0")}
"""Family of formats -> the smallest type that holds its values; of those not named here (int8, sparse8, codebooks)
levels are of 8 bits."""
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    model: Model,
    path: str | os.PathLike[str],
    kind: str | None = "f16",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, str]:
    """Write every weight of `model` to `path`, matrices as `kind` (f32, f16, bf16, q8_0 or q4_0), vectors as f32.

    None: each matrix as the smallest type that holds its values exactly. Quantised matrices are taken over as they are
    wherever the type can hold them, nothing is rounded twice. A tied head is not written twice. A matrix whose columns
    do not divide into blocks is written as f16, as llama.cpp's own tool does. Returns the type of every matrix by
    weight name. Raises CheckpointError where llama.cpp cannot say the model, OutputError where the file cannot be
    written.
    """
    if kind is not None and kind not in KINDS:
        raise CheckpointError(f"there is no GGUF type '{kind}' here", f"one of: {', '.join(KINDS)}")
    if model.structure:
        raise CheckpointError(
            f"{model.source} departs from its config.json, which cannot be written as GGUF", "export it --to onnx"
        )
    chosen = kinds(model, kind)
    most = Counter(
        {k: sum(int(np.prod(model.graph.weights[n].shape)) for n in chosen if chosen[n] is k) for k in chosen.values()}
    ).most_common(1)[0][0]
    metadata = describe(model, KINDS[kind] if kind else most)
    container.write(Path(path), metadata, _tensors(model, chosen), progress)
    return {name: found.name for name, found in chosen.items()}


def kinds(model: Model, kind: str | None) -> dict[str, Kind]:
    """The type of every matrix, by weight name."""
    made: dict[str, Kind] = {}
    for spec in model.graph.matrices():
        chosen = KINDS[kind or EXACT.get(model.formats[spec.name].split("-")[0], "q8_0")]
        made[spec.name] = chosen if spec.shape[-1] % chosen.block == 0 else KINDS["f16"]
    return made


def describe(model: Model, kind: Kind) -> dict[str, container.Value]:
    """The key-values of the file."""
    arch = _architecture(model)
    graph, attention = model.graph, _attention(model)
    context = graph.context if attention.window is None else min(graph.context, attention.window)
    made: dict[str, container.Value] = {
        "general.architecture": arch,
        "general.name": Path(model.source).name,
        "general.file_type": kind.file_type,
        "general.quantization_version": 2,
        f"{arch}.block_count": len(graph.blocks),
        f"{arch}.context_length": context,  # llama.cpp slides no window in these: up to it, both see the same
        f"{arch}.embedding_length": graph.hidden,
        f"{arch}.feed_forward_length": _rows(graph, "model.layers.0.mlp.up_proj.weight"),
        f"{arch}.attention.head_count": attention.heads,
        f"{arch}.attention.head_count_kv": attention.kv_heads,
        f"{arch}.attention.key_length": attention.head_dim,
        f"{arch}.attention.value_length": attention.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(_norm_eps(graph)),
        f"{arch}.rope.dimension_count": attention.head_dim,
        f"{arch}.rope.freq_base": rope_base(model),
        f"{arch}.vocab_size": graph.vocabulary,
    }
    return made | vocabulary(model.path, graph.vocabulary)


def permuted(values: Float32, heads: int) -> Float32:
    """Rows of each head reordered from halves (i, i + n), as Hugging Face pairs them, to neighbours (2i, 2i + 1)."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _architecture(model: Model) -> str:
    """llama.cpp's name of the architecture; CheckpointError where it has none, or lacks what the model asks for."""
    stated = str(model.config.get("model_type"))
    if stated not in ARCHITECTURES:
        raise CheckpointError(
            f"model type '{stated}' cannot be written as GGUF", f"model types that can: {', '.join(ARCHITECTURES)}"
        )
    attention, rope = _attention(model), {(n.op.frequencies, n.op.factor) for n in _nodes(model.graph, Rope)}
    lacks = None
    if attention.softcap is not None or not np.isclose(attention.scale, attention.head_dim**-0.5):
        lacks = "another attention scale or a soft cap"
    elif any(n.op.kind != "silu" for n in _nodes(model.graph, Gate)):
        lacks = "another activation than silu"
    elif len(rope) != 1 or any(2 * len(f) != attention.head_dim or factor != 1.0 for f, factor in rope):
        lacks = "rope of a part of a head, or with a factor"
    elif ARCHITECTURES[stated] != "llama" and not np.allclose(_rope_factors(model), 1.0, rtol=1e-5):
        lacks = "scaled rope"
    if lacks:
        raise CheckpointError(f"{model.source} has {lacks}, which llama.cpp's '{ARCHITECTURES[stated]}' does not know")
    return ARCHITECTURES[stated]


def rope_base(model: Model) -> float:
    values = model.config.get("rope_parameters") or {}
    return float(values.get("rope_theta") or model.config.get("rope_theta") or 10000.0)


def _rope_factors(model: Model) -> Float32:
    """What llama.cpp divides each unscaled frequency by: [head_dim / 2]."""
    frequencies = np.array(next(iter(_nodes(model.graph, Rope))).op.frequencies, np.float64)
    exponents = np.arange(len(frequencies)) / len(frequencies)
    return np.asarray(rope_base(model) ** -exponents / frequencies, np.float32)


def _tensors(model: Model, chosen: dict[str, Kind]) -> dict[str, container.Tensor]:
    factors = _rope_factors(model)
    made: dict[str, container.Tensor] = {}
    if not np.allclose(factors, 1.0, rtol=1e-5):
        kind = KINDS["f32"]
        made["rope_freqs.weight"] = container.Tensor(factors.shape, kind, lambda: encode(factors, kind))
    for spec in model.graph.weights.values():
        kind = chosen.get(spec.name, KINDS["f32"])
        made[tensor_name(spec.name)] = container.Tensor(spec.shape, kind, partial(_encoded, model, spec, kind))
    return made


def _encoded(model: Model, spec: WeightSpec, kind: Kind) -> UInt8:
    if spec.is_matrix and kind.name in ("q4_0", "q8_0"):
        family = formats.get(model.formats[spec.name])
        if isinstance(family, Grouped) and (kind.name == "q8_0" or EXACT.get(family.kind) == "q4_0"):
            weight = model.weight(spec.name)
            assert isinstance(weight, Weight)
            levels, scales = levels_of(weight)
            spread = np.repeat(scales, family.group // kind.block, axis=1)[:, : spec.shape[1] // kind.block]
            return encode_levels(_turned(model, spec, levels), _turned(model, spec, spread), kind)
    return encode(_turned(model, spec, model.tensor(spec.name)), kind, tensor_name(spec.name))


def _turned(model: Model, spec: WeightSpec, values: Any) -> Any:
    """Rows in the order that the architecture's rope wants."""
    attention = _attention(model)
    if ARCHITECTURES[str(model.config["model_type"])] == "llama":
        for part, heads in (("q_proj", attention.heads), ("k_proj", attention.kv_heads)):
            if f".{part}." in spec.name:
                return permuted(values, heads)
    return values


def tensor_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`. Raises CheckpointError for a part GGUF lacks."""
    stem, _, suffix = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{suffix}"
    if stem.startswith("model.layers."):
        index, _, part = stem.removeprefix("model.layers.").partition(".")
        if part in PARTS:
            return f"blk.{index}.{PARTS[part]}.{suffix}"
    raise CheckpointError(f"tensor '{name}' has no name in GGUF")


def _nodes(graph: Graph, kind: type) -> list[Any]:
    return [node for node in graph.nodes if isinstance(node.op, kind)]


def _attention(model: Model) -> Attention:
    """The attention that all layers share, layer aside; CheckpointError where layers differ."""
    found = [n.op for n in _nodes(model.graph, Attention)]
    if len({replace(op, layer=0) for op in found}) != 1:
        raise CheckpointError(f"{model.source} has layers of different attention, which cannot be written as GGUF")
    first: Attention = found[0]
    return first


def _norm_eps(graph: Graph) -> float:
    return float(next(iter(_nodes(graph, Norm))).op.eps)


def _rows(graph: Graph, name: str) -> int:
    return graph.weights[name].shape[0]
