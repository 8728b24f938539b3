"""Gemma 3, text (Gemma Team 2025): gemma2 with normalised heads instead of capped scores, five sliding layers to one
full layer, and a rope of its own for each kind of layer."""

from __future__ import annotations

import math
from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, Rotation, Shape, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def read_ropes(fields: Fields, shape: Shape) -> dict[str, Rotation]:
    """Each kind of layer's rotation. `rope_scaling` of older configs speaks of full attention only."""
    stated = fields.value("rope_parameters")
    nested = stated if isinstance(stated, dict) else {}
    local = fields.optional_number("rope_local_base_freq") or 10_000.0
    parameters = {
        "full_attention": {**(nested.get("full_attention") or {}), **(fields.value("rope_scaling") or {})},
        "sliding_attention": {"rope_theta": local, **(nested.get("sliding_attention") or {})},
    }
    if nested.keys() - parameters.keys():
        raise fields.fail("rope_parameters", "an object with full_attention and sliding_attention")
    return {kind: read_rope(fields, shape, theta=1e6, parameters=p) for kind, p in parameters.items()}


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context, activation="hidden_activation")
    rotations = read_ropes(fields, shape)
    pattern = fields.integer("sliding_window_pattern")
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(shape.layers)]
    layer_types = fields.layer_types(default)
    windows = fields.windows(layer_types, fields.optional_integer("sliding_window"))
    bias = fields.flag("attention_bias")
    scale = fields.number("query_pre_attn_scalar") ** -0.5
    fields.only("use_bidirectional_attention", False)
    fields.only("attn_logit_softcapping")

    decoder = Decoder(shape, norm_offset=1.0)
    x = decoder.embed(scale=math.sqrt(shape.hidden))
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        attended = block.attention(
            block.norm(x, "input_layernorm"),
            rotations[layer_types[i]],
            bias=bias,
            output_bias=bias,
            qk_norm="head",
            window=windows[i],
            scale=scale,
        )
        x = block.add(x, block.norm(attended, "post_attention_layernorm"), "attention_residual")
        fed = block.feed_forward(block.norm(x, "pre_feedforward_layernorm"))
        x = block.end(block.add(x, block.norm(fed, "post_feedforward_layernorm"), "output"))
    return decoder.finish(x, fields.optional_number("final_logit_softcapping"))
