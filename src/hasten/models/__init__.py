"""Architectures, one a file: `build(config, context)` turns a config.json into a Graph.

The file's name is its model_type, and that is its registration.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from hasten.errors import ConfigError
from hasten.graph.graph import Graph
from hasten.models.common.fields import refuse_unsupported

__all__ = ["build", "renamed", "supported"]


def supported() -> list[str]:
    """Every model_type that works: the names of the files beside this one."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "common")


def _module(config: dict[str, Any]) -> Any:
    model_type = config.get("model_type")
    # The name is checked against the listing first, so that an import error inside a module surfaces as itself.
    if model_type not in supported():
        stated = f"model_type '{model_type}'" if model_type else "a config.json without model_type"
        raise ConfigError(f"{stated} is not supported", f"supported model types: {', '.join(supported())}")
    return importlib.import_module(f"hasten.models.{model_type}")


def build(config: dict[str, Any], context: int | None = None) -> Graph:
    """The graph of a model.

    `context` is the longest sequence it will be run at (default: the model's own limit); rope that depends on length
    (longrope, dynamic) is fixed by it. Raises ConfigError naming the field that is unknown, missing or makes no sense,
    ContextError where `context` exceeds what the model was made for.
    """
    module = _module(config)
    refuse_unsupported(config)
    graph: Graph = module.build(config, context)
    return graph


def renamed(config: dict[str, Any], tensor: str) -> str | None:
    """A checkpoint's tensor name as the graph calls it; None for parts that text needs not (a vision tower)."""
    module = _module(config)
    if any(tensor.startswith(prefix) for prefix in getattr(module, "OTHER_PARTS", ())):
        return None
    if tensor.endswith(".rotary_emb.inv_freq"):  # a constant that old checkpoints carry
        return None
    for prefix, replacement in getattr(module, "RENAMED", {}).items():
        if tensor.startswith(prefix):
            return str(replacement) + tensor[len(prefix) :]
    return tensor
