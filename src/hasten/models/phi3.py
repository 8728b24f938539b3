"""Phi 3, 3.5 and 4 (Abdin et al. 2024): llama with q, k, v and gate, up stored as one tensor each, longrope, and heads
that turn only in part (phi-4-mini)."""

from __future__ import annotations

from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context)
    # Early configs call longrope "su", or "yarn" although it never was.
    aliases = {"su": "longrope", "yarn": "longrope"}
    rotation = read_rope(fields, shape, kinds=("default", "longrope"), aliases=aliases, partial=True)
    window = fields.optional_integer("sliding_window")
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.only(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.only(name, 1)

    q, k = shape.query_width, shape.key_width
    decoder = Decoder(
        shape,
        fused={
            "self_attn.q_proj": ("self_attn.qkv_proj", 0),
            "self_attn.k_proj": ("self_attn.qkv_proj", q),
            "self_attn.v_proj": ("self_attn.qkv_proj", q + k),
            "mlp.gate_proj": ("mlp.gate_up_proj", 0),
            "mlp.up_proj": ("mlp.gate_up_proj", shape.intermediate),
        },
    )
    x = decoder.embed()
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        attended = block.attention(block.norm(x, "input_layernorm"), rotation, window=window)
        x = block.add(x, attended, "attention_residual")
        normed = block.norm(x, "post_attention_layernorm")
        x = block.end(block.add(x, block.feed_forward(normed), "output"))
    return decoder.finish(x)
