"""Quantised checkpoints that others write, one method a file: safetensors beside a config.json that names the method.

The file's name is the method's, with "_" for "-": `quant_method` in config.json's quantization_config. A module has
PARTS, what a matrix's tensors are called after its stem, and

    marks(found) -> bool                                   whether tensors of these names make a quantised matrix
    check(quantization)                                    CheckpointError for a variant that is not read
    read(name, parts, shape, quantization) -> Grid         a matrix [out, in] from its tensors
"""

from __future__ import annotations

from hasten.checkpoint.quantized.store import Quantized, quantization_of, supported

__all__ = ["Quantized", "quantization_of", "supported"]
