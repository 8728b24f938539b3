"""Qwen 3 (Yang et al. 2025): qwen2 without its biases, each head of q and k normalised before rope."""

from __future__ import annotations

from typing import Any

from hasten.graph.graph import Graph
from hasten.models.common import Block, Decoder, Fields, read_rope, read_shape
from hasten.models.qwen2 import DEFAULTS as QWEN2
from hasten.models.qwen2 import layer_windows

DEFAULTS = {**QWEN2, "head_dim": 128}


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    fields = Fields(config, DEFAULTS)
    shape = read_shape(fields, context)
    rotation = read_rope(fields, shape)
    windows = layer_windows(fields, shape.layers)
    bias = fields.flag("attention_bias")
    fields.only("mlp_bias", False)

    decoder = Decoder(shape)
    x = decoder.embed()
    for i in range(shape.layers):
        block = Block(decoder, i, x)
        normed = block.norm(x, "input_layernorm")
        attended = block.attention(normed, rotation, bias=bias, output_bias=bias, qk_norm="head", window=windows[i])
        x = block.add(x, attended, "attention_residual")
        normed = block.norm(x, "post_attention_layernorm")
        x = block.end(block.add(x, block.feed_forward(normed), "output"))
    return decoder.finish(x)
