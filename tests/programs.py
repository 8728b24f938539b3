"""Programs of the native backend for tests: limits, packed weights and batches in one line each."""

import numpy as np

from hasten import formats
from hasten.backends.batch import Batch, Limits, SamplingBatch

TOKENS_OF = np.random.default_rng(1).integers(0, 50, 40).astype(np.int32)


def limits(**changes):
    return Limits(
        **{
            "context": 64,
            "max_tokens": 48,
            "max_rows": 48,
            "max_sequences": 4,
            "kv_blocks": 6,
            "block_size": 16,
            "kv_format": "f32",
            "threads": 2,
            **changes,
        }
    )


def pack(graph, arrays, format_name="f32"):
    """Weights as the backend takes them: `format_name` may be a mapping from name to format's name."""
    chosen = format_name if isinstance(format_name, dict) else dict.fromkeys(graph.weights, format_name)
    return {
        name: formats.get(chosen.get(name, "f32")).pack(arrays[name].astype(np.float32))
        if spec.is_matrix
        else arrays[name].astype(np.float32)
        for name, spec in graph.weights.items()
    }


def batch(tokens, start=0, rows=None, table=(0, 1, 2, 3), hidden=None):
    count = len(tokens)
    return Batch(
        np.asarray(tokens, np.int32),
        np.arange(start, start + count, dtype=np.int32),
        np.array([0, count], np.int32),
        np.array([table], np.int32),
        np.arange(count, dtype=np.int32) if rows is None else np.array(rows, np.int32),
        hidden,
    )


def sampling(rows, **changes):
    kinds = {"top_k": np.int32, "prompt_length": np.int32, "seed": np.uint64, "position": np.int64}
    values = {
        "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition": 1, "presence": 0, "frequency": 0,
        "seed": 0, "position": 0, "prompt_length": 0,
    } | {k: v for k, v in changes.items() if k not in ("history", "logprobs")}  # fmt: skip
    arrays = {k: np.full(rows, v, kinds.get(k, np.float32)) for k, v in values.items()}
    history = changes.get("history", [np.zeros(0, np.int32)] * rows)
    return SamplingBatch(**arrays, history=history, logprobs=changes.get("logprobs", 0))
