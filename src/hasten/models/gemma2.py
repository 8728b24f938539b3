"""Gemma 2 (Gemma Team 2024): norms before and after attention and feed-forward, weights of norms stored less one,
embeddings scaled, scores and logits soft-capped, every other layer sliding."""

from __future__ import annotations

import math
from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context, activation="hidden_activation")
    rotation = read_rope(fields, shape)
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(shape.layers)]
    windows = fields.windows(fields.layer_types(default), fields.optional_integer("sliding_window"))
    bias = fields.flag("attention_bias")
    softcap = fields.optional_number("attn_logit_softcapping")
    scale = fields.number("query_pre_attn_scalar") ** -0.5
    fields.only("use_bidirectional_attention", False)

    decoder = Decoder(shape, norm_offset=1.0)
    x = decoder.embed(scale=math.sqrt(shape.hidden))
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        attended = block.attention(
            block.norm(x, "input_layernorm"),
            rotation,
            bias=bias,
            output_bias=bias,
            window=windows[i],
            scale=scale,
            softcap=softcap,
        )
        x = block.add(x, block.norm(attended, "post_attention_layernorm"), "attention_residual")
        fed = block.feed_forward(block.norm(x, "pre_feedforward_layernorm"))
        x = block.end(block.add(x, block.norm(fed, "post_feedforward_layernorm"), "output"))
    return decoder.finish(x, fields.optional_number("final_logit_softcapping"))
