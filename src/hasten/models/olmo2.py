"""OLMo 2 (OLMo Team 2024): norms stand after attention and feed-forward only, and q and k are normalised over their
whole width before they are split into heads."""

from __future__ import annotations

from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context)
    rotation = read_rope(fields, shape)
    bias = fields.flag("attention_bias")
    fields.only("mlp_bias", False)
    fields.only("clip_qkv")
    if "sliding_attention" in fields.layer_types(["full_attention"] * shape.layers):
        raise fields.fail("layer_types", "full_attention in every layer of olmo2")

    decoder = Decoder(shape)
    x = decoder.embed()
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        attended = block.attention(x, rotation, bias=bias, output_bias=bias, qk_norm="whole")
        x = block.add(x, block.norm(attended, "post_attention_layernorm"), "attention_residual")
        fed = block.norm(block.feed_forward(x), "post_feedforward_layernorm")
        x = block.end(block.add(x, fed, "output"))
    return decoder.finish(x)
