"""transformers on torch in bf16: eager, and compiled by torch. It reads the shared checkpoint itself."""

from __future__ import annotations

from typing import Any

from hasten.bench.peers.common import Environment, Job, Prepared, Variant, Workload

COMPILED_WORKLOADS = ("prefill-512", "decode-1")


def install(home: Environment) -> None:
    home.venv()
    home.pip("install", "torch", "transformers", "setuptools")


def version(home: Environment) -> str:
    return f"{home.version_of('transformers')}, torch {home.version_of('torch')}"


def environment(home: Environment) -> dict[str, str]:
    return {"TORCHINDUCTOR_CACHE_DIR": str(home.path / "inductor")}  # compiled once for all runs


def variants(bits: int) -> list[Variant]:
    return [Variant("bf16", 16), Variant("bf16 compiled", 16, settings={"compiled": True})]


def prepare(job: Job, variant: Variant) -> Prepared:
    size = 2 * job.model.graph.parameters()
    return Prepared({"path": str(job.checkpoint), **variant.settings}, size - 2 * job.embedding, size)


def choices(workload: Workload, variant: Variant) -> list[dict[str, Any]]:
    """Compiling takes minutes: two workloads are enough to see whether it is worth them."""
    return [] if variant.settings and workload.name not in COMPILED_WORKLOADS else [{}]
