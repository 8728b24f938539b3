"""Flags that say how to draw tokens: the same for every command that writes."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.cli.options import option

if TYPE_CHECKING:
    from hasten.engine.request import SamplingParams

FALLBACK = {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Where neither the user nor the model's generation_config.json says anything."""


@dataclass(frozen=True)
class Sampling:
    temperature: float | None = option(None, help="0: always the likeliest token (default: the model's own, or 0.8)")
    top_p: float | None = option(
        None, help="only the likeliest tokens that sum to this (default: the model's, or 0.95)"
    )
    top_k: int | None = option(None, help="only this many of the likeliest tokens, 0: all (default: the model's, or 0)")
    min_p: float | None = option(None, help="only tokens this likely beside the likeliest (default: the model's, or 0)")
    repetition_penalty: float | None = option(None, help="above 1: less of what was there (default: the model's, or 1)")
    seed: int | None = option(None, help="the same seed gives the same text (default: a new one)")

    def params(self, generation: dict[str, Any], **others: Any) -> SamplingParams:
        """Parameters from flags first, then the model's generation config, then FALLBACK.

        Raises InputError for values that make no sense.
        """
        from hasten.engine.request import SamplingParams

        values: dict[str, Any] = {}
        for name, fallback in FALLBACK.items():
            chosen, stated = getattr(self, name), generation.get(name)
            values[name] = chosen if chosen is not None else fallback if stated is None else stated
        if generation.get("do_sample") is False and self.temperature is None:
            values["temperature"] = 0.0
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return SamplingParams(**values, seed=seed, **others)
