"""Tiny configs of every architecture and rope variant, with weights that NumPy makes from a seed: nothing to store."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.graph.graph import Graph, WeightSpec

Float32 = npt.NDArray[np.float32]

TOKENS = np.random.default_rng(7).integers(0, 48, 40).astype(np.int64)
ROWS = np.array([0, 7, 15, 23, 31, 39])
"""Rows of the logits that golden files keep."""

BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**BASE, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.2, 2.0, 4.0, 9.0]}
HALF_LONGROPE = {"short_factor": [1.0, 1.2], "long_factor": [1.5, 4.0]}
GEMMA3_TEXT = {
    **GEMMA,
    "num_hidden_layers": 3,
    "sliding_window_pattern": 3,
    "rope_theta": 50000.0,
    "rope_local_base_freq": 500.0,
}


def _case(model_type: str, base: dict[str, Any] = BASE, **fields: Any) -> dict[str, Any]:
    return {**base, "model_type": model_type, **fields}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _case("llama"),
    "llama-tied": _case("llama", tie_word_embeddings=True, rope_theta=500.0),
    "llama-biases": _case("llama", attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama-wide-heads": _case("llama", head_dim=12, num_key_value_heads=1, hidden_act="relu"),
    "llama-linear": _case("llama", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama-dynamic": _case("llama", max_position_embeddings=24, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "llama-llama3": _case("llama", head_dim=16, rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_theta=5000.0),
    "llama-yarn": _case(
        "llama",
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama-yarn-mscale": _case(
        "llama",
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
        },
    ),
    "mistral": _case("mistral", sliding_window=8),
    "mistral-full": _case("mistral", sliding_window=None, head_dim=16),
    "qwen2": _case("qwen2", tie_word_embeddings=True),
    "qwen2-sliding": _case("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": _case("qwen3", head_dim=16),
    "qwen3-bias": _case(
        "qwen3",
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _case("phi3", sliding_window=10),
    "phi3-longrope-long": _case(
        "phi3", original_max_position_embeddings=16, rope_scaling={"type": "longrope", **LONGROPE}
    ),
    "phi3-longrope-short": _case(
        "phi3",
        max_position_embeddings=128,
        original_max_position_embeddings=64,
        rope_scaling={"type": "longrope", **LONGROPE},
    ),
    "phi3-partial": _case(
        "phi3",
        partial_rotary_factor=0.5,
        original_max_position_embeddings=16,
        rope_scaling={"type": "longrope", **HALF_LONGROPE},
        tie_word_embeddings=True,
    ),
    "gemma2": _case("gemma2", GEMMA),
    "gemma2-uncapped": _case(
        "gemma2", GEMMA, attn_logit_softcapping=None, final_logit_softcapping=None, hidden_activation="gelu"
    ),
    "gemma3_text": _case("gemma3_text", GEMMA3_TEXT),
    "gemma3_text-linear": _case(
        "gemma3_text",
        {k: v for k, v in GEMMA3_TEXT.items() if k not in ("rope_theta", "rope_local_base_freq")},
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
        final_logit_softcapping=10.0,
    ),
    "gemma3": {"model_type": "gemma3", "text_config": _case("gemma3_text", GEMMA3_TEXT), "vision_config": {}},
    "smollm3": _case("smollm3", num_hidden_layers=4, tie_word_embeddings=True),
    "smollm3-sliding": _case(
        "smollm3", no_rope_layers=[0, 1], use_sliding_window=True, sliding_window=8, attention_bias=True, mlp_bias=True
    ),
    "olmo2": _case("olmo2"),
    "olmo2-bias": _case("olmo2", attention_bias=True, rope_theta=500.0),
}


def context(name: str) -> int | None:
    """The context a case is built for, where rope depends on it."""
    return {"llama-dynamic": len(TOKENS), "phi3-longrope-short": 64}.get(name)


def tensor(name: str, shape: tuple[int, ...]) -> Float32:
    """The checkpoint's tensor `name`: keyed by its name alone, so that order does not matter."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) == 2:
        return (rng.normal(0, 1.5, shape) * shape[1] ** -0.5).astype(np.float32)
    return rng.normal(1, 0.3, shape).astype(np.float32)


def sources(graph: Graph) -> dict[str, tuple[int, ...]]:
    """The tensors a checkpoint of `graph` holds, with their shapes; parts of a fused tensor are put together."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in graph.weights.values():
        rows = spec.rows[1] if spec.rows else spec.shape[0]
        known = shapes.get(spec.source, (0,))
        shapes[spec.source] = (max(rows, known[0]), *spec.shape[1:])
    return shapes


def weights(graph: Graph) -> dict[str, Float32]:
    """Every weight of `graph`, cut out of its tensor."""
    made = {name: tensor(name, shape) for name, shape in sources(graph).items()}

    def cut(spec: WeightSpec) -> Float32:
        start, stop = spec.rows or (0, spec.shape[0])
        return made[spec.source][start:stop]

    return {name: cut(spec) for name, spec in graph.weights.items()}
