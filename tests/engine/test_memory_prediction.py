"""Predicted buffers against those that a compiled program allocates."""

from __future__ import annotations

import pytest

from hasten import checkpoint, models
from hasten.backends import native
from hasten.backends.batch import Limits
from hasten.backends.cache import KvFormat
from hasten.engine import memory

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 500,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 1,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", ["int4-g64", "int8-g32", "bf16", "f32"])
@pytest.mark.parametrize(
    ("context", "threads", "kv_format"),
    [(32768, 1, "bf16"), (512, 2, "int8"), (32768, 2, "int4"), (16384, 4, "f32"), (512, 1, ("int4",))],
)
def test_buffers_are_what_was_predicted(name: str, context: int, threads: int, kv_format: KvFormat) -> None:
    graph = models.build(CONFIG)
    limits = Limits(context=context, threads=threads, kv_blocks=context // 32, kv_format=kv_format)
    taken = native.compile(graph, checkpoint.random_weights(graph, name), limits).memory()
    stored = {spec.name: name for spec in graph.matrices()}
    predicted = memory.predict(graph, memory.weight_bytes(graph, stored), limits, stored)
    assert predicted.kv_cache == taken["kv_cache"]
    assert predicted.buffers == pytest.approx(taken["buffers"], rel=0.1)
