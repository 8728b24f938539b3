"""GGUF, the file format of llama.cpp: written from any model that hasten opens, so that both can run the same weights.

Our own writer rather than the `gguf` package: what is needed is a header, two block formats and names, and a model's
tensors are to pass through one at a time, whatever they were stored as.
"""

from __future__ import annotations

from hasten.checkpoint.gguf.blocks import KINDS
from hasten.checkpoint.gguf.export import ARCHITECTURES, write_gguf

__all__ = ["ARCHITECTURES", "KINDS", "write_gguf"]
