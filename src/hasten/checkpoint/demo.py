"""The model that ships with the package, and text it has never seen: modules of the running Python's library."""

from __future__ import annotations

import json
import sysconfig
from importlib import resources
from pathlib import Path

from hasten.errors import InputError

SPLITS = ("calibration", "search", "final")


def directory() -> Path:
    return Path(str(resources.files("hasten") / "demo"))


def demo_text(split: str) -> str:
    """Held-out Python source for "calibration", "search" or "final"; splits share no file.

    Read from the running Python's standard library; where that holds no sources, from a text in the package.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}' of the demo's text", f"one of: {', '.join(SPLITS)}")
    names = json.loads((directory() / "splits.json").read_text(encoding="utf-8"))[split]
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / n).read_text(encoding="utf-8") for n in names if (library / n).is_file()]
    return "\n".join(texts) if texts else _fallback(split)


def _fallback(split: str) -> str:
    """A share of the package's own text, cut between its modules; the last and largest is the final test."""
    modules = (directory() / "fallback.txt").read_text(encoding="utf-8").split("\n# ---- ")
    bounds = (0, 3, 5, len(modules))
    number = SPLITS.index(split)
    return "\n# ---- ".join(modules[bounds[number] : bounds[number + 1]])
