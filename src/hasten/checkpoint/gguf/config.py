"""A GGUF file's key-values as the config.json that the same model has on the hub: the inverse of export.describe."""

from __future__ import annotations

from typing import Any

import numpy as np

from hasten.checkpoint.gguf.reader import File
from hasten.errors import CheckpointError

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture -> model_type."""
ROPE_FACTORS = "rope_freqs.weight"


class Keys:
    """Key-values of one architecture, with their types checked."""

    def __init__(self, file: File, arch: str) -> None:
        self.file, self.arch = file, arch

    def _value(self, name: str) -> tuple[str, Any]:
        key = f"{self.arch}.{name}"
        return key, self.file.metadata.get(key)

    def integer(self, name: str, default: int | None = None) -> int:
        key, value = self._value(name)
        value = default if value is None else value
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all() and value.dtype.kind in "iu":
            value = int(value[0])  # one for each layer, all alike
        if type(value) is not int or not 0 <= value < 1 << 31:
            stated = "is missing" if value is None else f"is {value!r}"[:200]
            raise CheckpointError(f"{self.file.path}: {key} {stated}, must be a whole number for all layers")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        key, value = self._value(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise CheckpointError(f"{self.file.path}: {key} is {value!r}, must be a positive number"[:300])
        return float(str(np.float32(value)))  # 1e-5 was written as float32 and is meant

    def text(self, name: str) -> str | None:
        key, value = self._value(name)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{self.file.path}: {key} must be text")
        return value


def architecture(file: File) -> str:
    """llama.cpp's name. Raises CheckpointError for one that is not read."""
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in MODEL_TYPES:
        raise CheckpointError(
            f"{file.path}: GGUF files of architecture {arch!r} are not read"[:300],
            f"read are: {', '.join(MODEL_TYPES)}; the model's Hugging Face directory is read where its type is known",
        )
    return arch


def config(file: File) -> dict[str, Any]:
    """What config.json would say. Raises CheckpointError naming a key that is missing or asks for what is not known."""
    arch = architecture(file)
    keys = Keys(file, arch)
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise CheckpointError(
            f"{file.path} is one of {parts!r} parts of a model"[:300], "llama-gguf-split --merge makes one file of them"
        )
    if keys.integer("expert_count", 0):
        raise CheckpointError(f"{file.path}: mixtures of experts are not supported")
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // heads if heads else None)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(name, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: {arch}.{name} is {keys.integer(name)}, must be the heads' {head_dim} for model type "
                f"'{MODEL_TYPES[arch]}'"
            )
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    context = keys.integer("context_length")
    made: dict[str, Any] = {
        "model_type": MODEL_TYPES[arch],
        "vocab_size": table.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": {"F32": "float32", "BF16": "bfloat16"}.get(table.type.name, "float16"),
    }
    if arch != "qwen2":  # which always has them
        made["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch == "llama":
        made["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    scaling = rope_scaling(file, keys, head_dim, context)
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    ids = {name: i for name, i in ids.items() if type(i) is int and i < table.shape[0]}
    if "bos" in ids:
        made["bos_token_id"] = ids["bos"]
    ends = [ids[name] for name in ("eos", "eot") if name in ids]  # either ends a text for llama.cpp
    if ends:
        made["eos_token_id"] = ends[0] if len(set(ends)) == 1 else ends
    return made | ({"rope_scaling": scaling} if scaling else {})


def rope_scaling(file: File, keys: Keys, head_dim: int, context: int) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type")
    if ROPE_FACTORS in file.tensors:
        entry = file.tensors[ROPE_FACTORS]
        if entry.shape != (head_dim // 2,) or entry.type.name != "F32":
            raise CheckpointError(f"{file.path}: tensor '{ROPE_FACTORS}' must be F32[{head_dim // 2}]")
        factors = [float(f) for f in entry.type.values(file.rows(ROPE_FACTORS).reshape(-1, 4))[:, 0]]
        # Longrope is the scaling that takes any factors: one set for all lengths, and cos and sin as they are.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "original_max_position_embeddings": context,
        }
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    raise CheckpointError(f"{file.path}: rope scaling {kind!r} is not read from GGUF, only linear is"[:300])
