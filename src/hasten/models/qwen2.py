"""Qwen 1.5, 2 and 2.5 (Yang et al. 2024): llama with biases on q, k and v, and sliding windows in the upper layers
where `use_sliding_window` asks for them."""

from __future__ import annotations

from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}


def layer_windows(fields: Fields, layers: int) -> list[int | None]:
    """Each layer's window: layers from `max_window_layers` on slide, unless `layer_types` says otherwise."""
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    first = fields.integer("max_window_layers", minimum=0) if window is not None else layers
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return fields.windows(fields.layer_types(default), window)


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context)
    rotation = read_rope(fields, shape)
    windows = layer_windows(fields, shape.layers)
    fields.only("attention_bias", True)
    fields.only("mlp_bias", False)

    decoder = Decoder(shape)
    x = decoder.embed()
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        attended = block.attention(block.norm(x, "input_layernorm"), rotation, bias=True, window=windows[i])
        x = block.add(x, attended, "attention_residual")
        normed = block.norm(x, "post_attention_layernorm")
        x = block.end(block.add(x, block.feed_forward(normed), "output"))
    return decoder.finish(x)
