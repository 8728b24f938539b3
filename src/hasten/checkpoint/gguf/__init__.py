"""GGUF, the file format of llama.cpp: read as a model, and written from any model that hasten opens.

Our own reader and writer rather than the `gguf` package: headers are distrusted, and a model's tensors are to pass
through one at a time, whatever they were stored as.
"""

from __future__ import annotations

from hasten.checkpoint.gguf.blocks import KINDS
from hasten.checkpoint.gguf.export import ARCHITECTURES, write_gguf

__all__ = ["ARCHITECTURES", "KINDS", "write_gguf"]
