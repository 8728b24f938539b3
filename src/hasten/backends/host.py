"""The processor's name."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as its maker writes it, or the architecture's."""
    try:
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
