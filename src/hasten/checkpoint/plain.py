"""Writing a model as a plain Hugging Face directory, for programs that read no artifacts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import models
from hasten.checkpoint.huggingface import by_source, full_shape
from hasten.checkpoint.model import Model, Progress
from hasten.checkpoint.write import BESIDE
from hasten.errors import CheckpointError, OutputError
from hasten.formats.base import Float32
from hasten.graph.graph import WeightSpec
from hasten.graph.ops import Norm

POOL = 1 << 20  # drawn once and repeated: drawing hundreds of millions takes longer than measuring
DTYPES = {"f32": ("F32", "float32", 4), "f16": ("F16", "float16", 2), "bf16": ("BF16", "bfloat16", 2)}
"""A dense format -> safetensors' name, torch's name, bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor to be: `data` is called once, when its turn comes, and hands out its bytes in pieces."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], Iterable[npt.NDArray[Any]]]


def write_plain(
    path: Path,
    model: Model,
    tensor: Callable[[WeightSpec], Float32],
    dtype: str = "bf16",
    progress: Progress | None = None,
) -> Path:
    """config.json, model.safetensors and the tokenizer's files at `path`, which must not exist.

    `tensor` hands out each weight, float32, rounded here to `dtype`. Raises OutputError where it cannot be written,
    CheckpointError for values that `dtype` does not hold.
    """
    with staged(path) as staging:
        write_config(staging, model, {"torch_dtype": DTYPES[dtype][1]})
        stored = {
            name: dense(name, specs, tensor, dtype) for name, specs in by_source(model.graph).items()
        }  # parts of a fused tensor stand together, in the order of their rows
        write_tensors(staging / "model.safetensors", stored, progress)
    return path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` when the with-block ends well, and is removed when it does not."""
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield staging
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)
        staging.rename(path)
        staging = None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or error
        raise OutputError(f"{path} cannot be written: {reason}", "nothing was left behind" if full else None) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def write_config(folder: Path, model: Model, fields: Mapping[str, Any]) -> None:
    """config.json with `fields` in place of what it says of them and of its dtype, and the tokenizer's files."""
    config = dict(model.config)
    if config.get("model_type") == "gemma3":  # with a vision tower that is not written
        config = {"model_type": "gemma3_text", **config["text_config"]}
    for stale in ("dtype", "torch_dtype", "source_gguf", "quantization_config", "architectures"):
        config.pop(stale, None)
    (folder / "config.json").write_text(json.dumps({**config, **fields}, indent=1) + "\n", encoding="utf-8")
    for name in BESIDE:
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, folder / name)


def write_tensors(path: Path, stored: Mapping[str, Stored], progress: Progress | None = None) -> None:
    """One safetensors file, a tensor in memory at a time."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in stored.items():
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for done, (name, tensor) in enumerate(stored.items()):
            if progress is not None:
                progress(f"writing {path.name}", done, len(stored))
            start = file.tell()
            for piece in tensor.data():
                file.write(np.ascontiguousarray(piece).data)
            assert file.tell() - start == tensor.nbytes, name
        file.flush()
        os.fsync(file.fileno())
    if progress is not None:
        progress(f"writing {path.name}", len(stored), len(stored))


def dense(name: str, specs: list[WeightSpec], tensor: Callable[[WeightSpec], Float32], dtype: str) -> Stored:
    """The tensor `name` of a checkpoint as `dtype`, put together from the weights that are cut from it."""
    shape, (kind, _, size) = full_shape(specs), DTYPES[dtype]

    def data() -> Iterator[npt.NDArray[Any]]:
        for spec in specs:
            yield rounded(tensor(spec), dtype, name)

    return Stored(kind, shape, size * int(np.prod(shape, dtype=np.int64)), data)


def rounded(values: Float32, dtype: str, name: str) -> npt.NDArray[Any]:
    """Finite float32 as the nearest f32, f16 or bf16 (as its 16 bits). Raises CheckpointError naming the tensor."""
    if dtype == "f32":
        return np.ascontiguousarray(values, "<f4")
    if dtype == "bf16":
        return to_bf16(values)
    with np.errstate(over="ignore", under="ignore"):
        half = values.astype("<f2")
    if not bool(np.isfinite(half).all()):
        raise CheckpointError(f"tensor '{name}' has values beyond what f16 holds", "write it as bf16 or f32 (--dtype)")
    return half


def refuse_reshaped(model: Model, target: str) -> None:
    """Raise CheckpointError for a graph that the model's config does not describe: blocks or matrices were cut."""
    plain = models.build(model.config, model.graph.context)
    shapes = {name: spec.shape for name, spec in plain.weights.items()}
    own = {name: spec.shape for name, spec in model.graph.weights.items()}
    if shapes == own and [n.op for n in plain.nodes] == [n.op for n in model.graph.nodes]:
        return
    odd = next((n for n in own if shapes.get(n) != own[n]), None) or next((n for n in shapes if n not in own), "")
    raise CheckpointError(
        f"{model.source} is no plain {model.config.get('model_type')}: "
        + (f"'{odd}' is not of the shape that its config gives" if odd else "its blocks differ from the config's")
        + f"; {target} cannot express that",
        "--to hf writes the plain model that computes the same, --to onnx any graph",
    )


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
