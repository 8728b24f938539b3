"""hasten makes a language model fast on the machine it will run on, within a quality budget that its user states."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.engine.llm import LLM as LLM
    from hasten.engine.request import RequestOutput as RequestOutput
    from hasten.engine.request import SamplingParams as SamplingParams
    from hasten.engine.request import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"
__all__ = ["LLM", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]

_HOMES = {
    "LLM": "hasten.engine.llm",
    "RequestOutput": "hasten.engine.request",
    "SamplingParams": "hasten.engine.request",
    "StructuredOutputsParams": "hasten.engine.request",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hasten' has no attribute '{name}'")
