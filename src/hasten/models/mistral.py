"""Mistral (Jiang et al. 2023): llama with a sliding attention window in every layer."""

from __future__ import annotations

from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context)
    rotation = read_rope(fields, shape)
    window = fields.optional_integer("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    if set(fields.layer_types([kind] * shape.layers)) != {kind}:
        raise fields.fail("layer_types", f"{kind} in every layer, as sliding_window says")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)

    decoder = Decoder(shape)
    x = decoder.embed()
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        attended = block.attention(block.norm(x, "input_layernorm"), rotation, window=window)
        x = block.add(x, attended, "attention_residual")
        normed = block.norm(x, "post_attention_layernorm")
        x = block.end(block.add(x, block.feed_forward(normed), "output"))
    return decoder.finish(x)
