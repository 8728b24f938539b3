"""The flag that says how keys and values are kept: the same for every command that runs a model."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.cli.options import option


@dataclass(frozen=True)
class Cache:
    kv_format: str = option(
        "auto",
        choices=("auto", "bf16", "int8", "f32"),
        help="keys and values in the cache; int8 takes half of bf16's memory; auto: f32 for f32 weights, else bf16",
    )
