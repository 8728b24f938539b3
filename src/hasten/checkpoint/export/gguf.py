"""A GGUF file for llama.cpp. Every quantised format of ours has a type there that holds its values as they are."""

from __future__ import annotations

from pathlib import Path

from hasten.checkpoint.expanded import without_dropped
from hasten.checkpoint.export import Options, Written
from hasten.checkpoint.gguf.blocks import KINDS
from hasten.checkpoint.gguf.export import EXACT, kinds, write_gguf
from hasten.checkpoint.gguf.vocabulary import vocabulary
from hasten.checkpoint.model import Model, Progress
from hasten.checkpoint.plain import refuse_reshaped
from hasten.errors import CheckpointError, InputError, OutputError

KIND = "a GGUF file"
TAKES = ("type",)


def write(model: Model, out: Path, options: Options, progress: Progress | None) -> Written:
    """Without a type: each matrix as the smallest that holds its values exactly."""
    if options.type is not None and options.type not in KINDS:
        raise InputError(f"there is no GGUF type '{options.type}' here", f"one of: {', '.join(KINDS)}")
    _check_output(out)
    model = without_dropped(model)
    refuse_reshaped(model, "GGUF")
    if vocabulary(model.path, model.graph.vocabulary).get("tokenizer.ggml.model") == "no_vocab":
        raise CheckpointError(
            f"{model.source} has no tokenizer that GGUF can express: llama.cpp could run no text with it",
            "--to hf takes the tokenizer along as it is",
        )
    types = write_gguf(model, out, options.type, progress)
    exact = {name: EXACT.get(format.split("-")[0], "q8_0") for name, format in model.formats.items()}
    rounded = [name for name, kind in types.items() if not _holds(kind, exact[name])]
    ragged = [name for name in rounded if kinds(model, options.type)[name].name != (options.type or exact[name])]
    notes = []
    if ragged:
        notes.append(f"{len(ragged)} matrices are written as f16: their columns are no multiple of GGUF's blocks of 32")
    if len(rounded) > len(ragged):
        notes.append(f"{len(rounded) - len(ragged)} matrices are rounded to {options.type}")
    return Written(out, types, tuple(notes))


def _holds(kind: str, exact: str) -> bool:
    """Whether `kind` holds all values of the type `exact`."""
    return kind in ("f32", exact) or (kind == "q8_0" and exact == "q4_0")


def _check_output(out: Path) -> None:
    if out.is_dir() or out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists", "choose another output, or remove it first")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no directory", "make it first")
