"""SmolLM 3 (Bakouch et al. 2025): llama in which some layers leave rope out (`no_rope_layers`: 0 means no rope)."""

from __future__ import annotations

from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}


def roped_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers have rope: all but every fourth, unless `no_rope_layers` lists a 1 or 0 for each."""
    value = fields.value("no_rope_layers")
    if value is None:
        interval = fields.integer("no_rope_layer_interval")
        return [bool((i + 1) % interval) for i in range(layers)]
    if not isinstance(value, list) or len(value) < layers or any(v not in (0, 1) for v in value):
        raise fields.fail("no_rope_layers", f"a list of at least {layers} of 0 (no rope) or 1")
    return [bool(v) for v in value[:layers]]


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context)
    rotation = read_rope(fields, shape, theta=2_000_000.0)
    roped = roped_layers(fields, shape.layers)
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    default = ["full_attention" if window is None or r else "sliding_attention" for r in roped]
    windows = fields.windows(fields.layer_types(default), window)
    attention_bias, mlp_bias = fields.flag("attention_bias"), fields.flag("mlp_bias")

    decoder = Decoder(shape)
    x = decoder.embed()
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        attended = block.attention(
            block.norm(x, "input_layernorm"),
            rotation if roped[i] else None,
            bias=attention_bias,
            output_bias=attention_bias,
            window=windows[i],
        )
        x = block.add(x, attended, "attention_residual")
        normed = block.norm(x, "post_attention_layernorm")
        x = block.end(block.add(x, block.feed_forward(normed, bias=mlp_bias), "output"))
    return decoder.finish(x)
