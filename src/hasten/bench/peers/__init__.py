"""Other engines to measure ourselves beside, one a file: its name, with "." for "_", is what `--against` takes.

A peer is a module that has
    install(home: Environment) -> None                make its environment; PeerError says why it cannot be had
    version(home: Environment) -> str                 of what was installed
    variants(bits: int) -> list[Variant]              how it holds weights of about so many bits; first, of equal bytes
    prepare(job: Job, variant: Variant) -> Prepared   write its input from the shared checkpoint
    choices(workload, variant) -> list[dict]          settings to try, the fastest is measured; none: not measured
    environment(home: Environment) -> dict[str, str]  variables its runner needs
and, where it has an OpenAI-compatible server of its own,
    serve(job, prepared, workload, choice) -> list[str]   the command that serves at port {port}
and its runner is `hasten.bench.runners.run_NAME`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from hasten.bench.peers.common import Environment, Job, PeerError, Prepared, Variant, Workload
from hasten.errors import InputError

__all__ = ["Environment", "Job", "PeerError", "Prepared", "Variant", "Workload", "get", "names"]


def names() -> list[str]:
    """Every peer as the command line calls it."""
    return sorted(m.name.replace("_", ".") for m in pkgutil.iter_modules(__path__) if m.name != "common")


def get(name: str) -> Any:
    """The module of a peer. Raises InputError where there is none of that name."""
    if name not in names():
        raise InputError(f"no such peer: {name}", f"peers: {', '.join(names())}")
    return importlib.import_module(f"hasten.bench.peers.{name.replace('.', '_')}")
