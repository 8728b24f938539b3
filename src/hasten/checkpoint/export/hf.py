"""A plain Hugging Face directory: dense weights, config and tokenizer, for whatever reads no quantised ones."""

from __future__ import annotations

from pathlib import Path

from hasten.checkpoint.expanded import expanded
from hasten.checkpoint.export import Options, Written
from hasten.checkpoint.model import Model, Progress
from hasten.checkpoint.plain import DTYPES, refuse_reshaped, write_plain
from hasten.checkpoint.write import check_output
from hasten.errors import InputError

KIND = "a Hugging Face directory of dense weights"
TAKES = ("dtype",)


def write(model: Model, out: Path, options: Options, progress: Progress | None) -> Written:
    """Without a dtype: the one that the weights have, f16 where some are quantised."""
    dtype = options.dtype or _own(model)
    if dtype not in DTYPES:
        raise InputError(f"there is no dtype '{dtype}' to write", f"one of: {', '.join(DTYPES)}")
    check_output(out)
    reshaped, model = bool(model.structure), expanded(model)
    refuse_reshaped(model, "a Hugging Face config")
    write_plain(out, model, lambda spec: model.tensor(spec.name), dtype, progress)
    stored = model.formats
    inexact = [name for name, format in stored.items() if not _holds(dtype, format)]
    notes = [f"{len(inexact)} matrices are rounded to {dtype}; --dtype f32 keeps every value"] if inexact else []
    if reshaped:
        notes.append("blocks that were narrowed or factored are written at their full size: they compute the same")
    if not (out / "tokenizer.json").exists():
        notes.append("the model has no tokenizer.json: none was written")
    return Written(out, dict.fromkeys(stored, dtype), tuple(notes))


def _own(model: Model) -> str:
    found = set(model.formats.values())
    if len(found) == 1 and found <= set(DTYPES):
        return found.pop()
    return "f32" if found <= set(DTYPES) else "f16"


def _holds(dtype: str, format: str) -> bool:
    return dtype in ("f32", format)
