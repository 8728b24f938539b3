"""Writing a model in others' formats, one target a file: the file's name is its registration ("-" for "_").

A module has

    KIND                                              what it makes, for people: "a GGUF file"
    TAKES                                             the fields of Options that mean something to it
    write(model, out, options, progress) -> Written   refuses what it cannot express before it writes anything
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import InputError

if TYPE_CHECKING:
    from hasten.checkpoint.model import Model, Progress


@dataclass(frozen=True)
class Options:
    """What a user may choose; None: the target's own choice."""

    type: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Written:
    """`types`: matrix -> what it was written as. `notes`: what is not exactly as it was."""

    path: Path
    types: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        files = [self.path] if self.path.is_file() else [p for p in self.path.iterdir() if p.is_file()]
        return sum(p.stat().st_size for p in files)


def targets() -> list[str]:
    """Every target's name."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get(name: str) -> Any:
    """The module of a target. Raises InputError listing those that exist."""
    if name not in targets():
        raise InputError(f"there is no export to '{name}'", f"targets: {', '.join(targets())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def check_options(name: str, options: Options) -> None:
    """Raise InputError for an option that `name` does not take."""
    for option in fields(options):
        if getattr(options, option.name) is not None and option.name not in get(name).TAKES:
            takes = [f"--{t}" for t in get(name).TAKES]
            raise InputError(
                f"--{option.name} means nothing for --to {name}",
                f"it takes {', '.join(takes)}" if takes else "it takes no options of its own",
            )


def export(model: Model, name: str, out: Path, options: Options, progress: Progress | None = None) -> Written:
    """Write `model` to `out` as target `name`. Raises InputError, CheckpointError or OutputError; nothing is left."""
    check_options(name, options)
    written: Written = get(name).write(model, out, options, progress)
    return written
