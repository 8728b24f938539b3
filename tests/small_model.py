"""A small model directory with random weights, a tokenizer of bytes and a chat template: enough for every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hasten.checkpoint import safetensors
from hasten.models import build

EOS = 257
CONFIG = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


def tokenizer() -> Tokenizer:
    """One token a byte, in the order of the byte-level alphabet, then <s> and </s>; nothing is added unasked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return made


def write(path: Path, *, chat: bool = True, seed: int = 0, **config: object) -> Path:
    """Write the model to `path`, a directory that must not exist, and return it."""
    path.mkdir()
    facts = {**CONFIG, **config}
    (path / "config.json").write_text(json.dumps(facts))
    tokenizer().save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATE} if chat else names))
    random = np.random.default_rng(seed)
    arrays = {
        spec.source: random.normal(0, 2.5 * spec.shape[1] ** -0.5, spec.shape).astype(np.float32)
        if spec.is_matrix
        else random.normal(1, 0.1, spec.shape).astype(np.float32)
        for spec in build(facts).weights.values()
    }
    # Printable ASCII comes first in the alphabet. All else has a logit of 0, so that likely tokens make plain text.
    arrays["model.embed_tokens.weight"][94:] = 0
    safetensors.write(path / "model.safetensors", arrays)
    return path
