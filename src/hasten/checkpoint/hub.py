"""Models of the Hugging Face hub. The only part of hasten that reaches the network, and only when a hub id is named."""

from __future__ import annotations

import re
from pathlib import Path

from hasten.errors import DependencyError, HubError

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
SMALL = [
    "config.json",
    "generation_config.json",
    "hasten.json",
    "quantize_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]
WEIGHTS = [
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("hasten-*.safetensors", "gptq_model*.safetensors"),
]


def is_id(source: str) -> bool:
    return ID.fullmatch(source) is not None and ".." not in source and not source.endswith((".json", ".safetensors"))


def fetch(source: str, weights: bool = True) -> Path:
    """The local snapshot of hub id `source`, downloaded where it is not in the cache yet. Raises HubError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DependencyError("huggingface_hub is not installed", "pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(source, allow_patterns=SMALL + (WEIGHTS if weights else [])))
    except Exception as error:
        # The library raises dozens of types, from its own to those of its HTTP client.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise HubError(
            f"'{source}' is no local directory and could not be fetched from the hub: {reason}",
            "check the spelling and your network, or name a local directory; gated models need `hf auth login`",
        ) from None
