"""Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024) and the many models of its shape."""

from __future__ import annotations

from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    # pretraining_tp splits sums for training on several devices; the formula is the same, so it is not read.
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context)
    rotation = read_rope(fields, shape)
    attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")
    fields.only("rope_interleaved", False)
    if "sliding_attention" in fields.layer_types(["full_attention"] * shape.layers):
        raise fields.fail("layer_types", "full_attention in every layer of llama")

    decoder = Decoder(shape)
    x = decoder.embed()
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        normed = block.norm(x, "input_layernorm")
        attended = block.attention(normed, rotation, bias=attention_bias, output_bias=attention_bias)
        x = block.add(x, attended, "attention_residual")
        normed = block.norm(x, "post_attention_layernorm")
        x = block.end(block.add(x, block.feed_forward(normed, bias=mlp_bias), "output"))
    return decoder.finish(x)
