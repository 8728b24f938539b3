"""Tiny model directories for these tests, written with the reference safetensors library's format by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from models import tiny

from hasten import models

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as stored: bf16 by truncation, so that what is read back is exact."""
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(DTYPES[dtype])


def decoded(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def safetensors_bytes(tensors: Mapping[str, tuple[str, np.ndarray]], **header: Any) -> bytes:
    """A file of (dtype, stored array) by name; keywords replace entries of the header, to make it lie."""
    entries: dict[str, Any] = {}
    at = 0
    for name, (dtype, array) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps({**entries, **header}).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for _, a in tensors.values())


def tensors(config: dict[str, Any], dtype: str = "F32") -> dict[str, tuple[str, np.ndarray]]:
    shapes = tiny.sources(models.build(config))
    return {name: (dtype, encoded(tiny.tensor(name, shape), dtype)) for name, shape in shapes.items()}


def directory(path: Path, config: dict[str, Any] = tiny.CONFIGS["llama"], dtype: str = "F32", shards: int = 1) -> Path:
    """A Hugging Face directory of a tiny model, whole or in shards, with a byte-level tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    made = tensors(config, dtype)
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(made))
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        homes = {name: names[i % shards] for i, name in enumerate(made)}
        for file in names:
            part = {n: t for n, t in made.items() if homes[n] == file}
            (path / file).write_bytes(safetensors_bytes(part))
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (path / "tokenizer.json").write_text(tokenizer_json())
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return path


def tokenizer_json(size: int = 48) -> str:
    """A BPE tokenizer of `size` tokens without merges: three special ones, then letters."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(0x61 + i): 3 + i for i in range(size - 3)}}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return str(tokenizer.to_str())
