"""OpenVINO: a model exported by optimum-intel, compressed by nncf, driven through OpenVINO's own runtime."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hasten.bench.peers.common import Environment, Job, PeerError, Prepared, Variant, Workload, once

SCRIPT = "run_openvino.py"
GROUP = 128


def install(home: Environment) -> None:
    home.venv()
    home.pip("install", "torch", "openvino", "nncf", "optimum-intel")
    try:
        home.run([str(home.python), "-c", "import torchvision"], "openvino: checking torchvision")
    except PeerError:  # built for another torch, it breaks the import of transformers; text needs none
        home.pip("uninstall", "-y", "torchvision")


def version(home: Environment) -> str:
    return home.version_of("openvino")


def environment(home: Environment) -> dict[str, str]:
    return {}


def variants(bits: int) -> list[Variant]:
    if bits == 4:
        alike = Variant(f"int4 g{GROUP}", 4, settings={"all_layers": True})
        mixed = Variant(f"{alike.name} default mix", 4, "default", {"all_layers": False})  # head and embeddings in int8
        return [alike, mixed]
    return [Variant("int8" if bits == 8 else "unquantised", bits, settings={"all_layers": True})]


def prepare(job: Job, variant: Variant) -> Prepared:
    source = job.folder / "exported"
    _made(source, lambda out: once(job.home, SCRIPT, "export", checkpoint=str(job.checkpoint), out=str(out)), job)
    out = job.folder / variant.name.replace(" ", "-")
    arguments = {"bits": variant.bits, "group": GROUP, **variant.settings}
    _made(out, lambda made: once(job.home, SCRIPT, "compress", source=str(source), out=str(made), **arguments), job)
    size = (out / "openvino_model.bin").stat().st_size
    embedding_bits = 8 if variant.mix == "default" else variant.bits
    return Prepared({"path": str(out)}, size - job.embedding * embedding_bits // 8, size, kv_bytes=1)


def _made(path: Path, make: Any, job: Job) -> None:
    """`make(path)`, unless it is there; under another name until it is whole."""
    if path.exists():
        return
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    job.report(f"OpenVINO makes {path.name}", 0, 1)
    make(part)
    part.rename(path)
    job.report(f"OpenVINO makes {path.name}", 1, 1)


def choices(workload: Workload, variant: Variant) -> list[dict[str, Any]]:
    return [{}]
