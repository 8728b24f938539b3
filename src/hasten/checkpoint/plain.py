"""Writing a model as a plain Hugging Face directory in bf16, for programs that read no artifacts."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hasten.checkpoint.model import Model
from hasten.checkpoint.write import BESIDE
from hasten.errors import OutputError
from hasten.formats.base import Float32
from hasten.graph.graph import WeightSpec
from hasten.graph.ops import Norm

POOL = 1 << 20  # drawn once and repeated: drawing hundreds of millions takes longer than measuring


def write_plain(path: Path, model: Model, tensor: Callable[[WeightSpec], Float32]) -> Path:
    """config.json, model.safetensors and the tokenizer's files at `path`, which must not exist.

    `tensor` hands out each weight, float32, rounded here to bf16. Raises OutputError where it cannot be written.
    """
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        (staging / "config.json").write_text(json.dumps({**model.config, "torch_dtype": "bfloat16"}, indent=1) + "\n")
        for name in BESIDE:
            if (model.path / name).is_file():
                shutil.copyfile(model.path / name, staging / name)
        _write_tensors(staging / "model.safetensors", model, tensor)
        staging.rename(path)
        staging = None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def _write_tensors(path: Path, model: Model, tensor: Callable[[WeightSpec], Float32]) -> None:
    """One file; parts of a fused tensor stand together, in the order of their rows."""
    sources: dict[str, list[WeightSpec]] = {}
    for spec in model.graph.weights.values():
        sources.setdefault(spec.source, []).append(spec)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, specs in sources.items():
        specs.sort(key=lambda spec: spec.rows or (0, 0))
        shape = [sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]]
        size = 2 * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for specs in sources.values():
            for spec in specs:
                file.write(to_bf16(tensor(spec)).data)


def to_bf16(values: Float32) -> npt.NDArray[np.uint16]:
    """Finite float32 rounded to the nearest bf16, ties to even, as its 16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def random_tensors(model: Model, seed: int = 0) -> Callable[[WeightSpec], Float32]:
    """Plausible weights for the shapes of `model`, the same for the same seed: norms near one, the rest near zero."""
    pool = np.random.default_rng(seed).normal(0.0, 0.02, POOL).astype(np.float32)
    centre = {n.weights[0]: 1 - n.op.offset for n in model.graph.nodes if isinstance(n.op, Norm)}
    places = {name: i for i, name in enumerate(model.graph.weights)}

    def tensor(spec: WeightSpec) -> Float32:
        start = places[spec.name] * 7919 % POOL
        values = np.resize(np.roll(pool, -start), spec.shape)
        return np.asarray(values + np.float32(centre.get(spec.name, 0.0)), np.float32)

    return tensor
