"""A tiny random Llama on disk with a byte-level tokenizer, and a text long enough to prove something on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hasten.checkpoint import safetensors

HIDDEN, FEED_FORWARD, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 256


def write_model(
    folder: Path, seed: int = 0, *, hidden: int = HIDDEN, feed_forward: int = FEED_FORWARD, layers: int = LAYERS
) -> Path:
    """Weights sharpen the logits (a head of large entries), so that compression is felt."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    arrays = {}

    def matrix(name: str, rows: int, columns: int, size: float = 1.0) -> None:
        arrays[name] = (rng.standard_t(5, (rows, columns)) * size / columns**0.5).astype(np.float32)

    matrix("model.embed_tokens.weight", len(vocabulary), hidden)
    matrix("lm_head.weight", len(vocabulary), hidden, 2.0)
    arrays["model.norm.weight"] = np.ones(hidden, np.float32)
    width = hidden // HEADS * KV_HEADS
    for i in range(layers):
        at = f"model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"{at}.{name}.weight"] = np.ones(hidden, np.float32)
        for name, rows in (("q", hidden), ("k", width), ("v", width), ("o", hidden)):
            matrix(f"{at}.self_attn.{name}_proj.weight", rows, hidden)
        matrix(f"{at}.mlp.gate_proj.weight", feed_forward, hidden)
        matrix(f"{at}.mlp.up_proj.weight", feed_forward, hidden)
        matrix(f"{at}.mlp.down_proj.weight", hidden, feed_forward)
    safetensors.write(folder / "model.safetensors", arrays, {"format": "pt"})
    return folder


def write_text(path: Path, characters: int = 5000, seed: int = 1) -> Path:
    """Random letters: no run of sixteen stands twice."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     .\n"))
    path.write_text("".join(np.random.default_rng(seed).choice(letters, characters)))
    return path
