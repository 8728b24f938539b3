"""Models on disk: Hugging Face directories, hasten's artifacts, the hub, tokenizers and the demo that ships."""

from __future__ import annotations

from hasten.checkpoint.artifact import verify
from hasten.checkpoint.demo import demo_text
from hasten.checkpoint.model import Model, open, random_weights
from hasten.checkpoint.tokenizer import Stream, Tokenizer
from hasten.checkpoint.write import check_output, write_artifact

__all__ = [
    "Model",
    "Stream",
    "Tokenizer",
    "check_output",
    "demo_text",
    "open",
    "random_weights",
    "verify",
    "write_artifact",
]
