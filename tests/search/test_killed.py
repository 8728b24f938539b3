"""A search that is killed again and again ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from search.tiny_model import write_model, write_text


def run(files: tuple[Path, Path], output: Path, moment: str) -> dict[str, int]:
    """The number of each kind of moment; {} where it was killed."""
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), *map(str, files), str(output), moment]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == (0 if moment == "never" else -signal.SIGKILL), done.stderr
    return {name: int(count) for name, count in (pair.split("=") for pair in done.stdout.split())}


def test_killed_at_many_moments_it_ends_as_if_it_never_was(tmp_path: Path) -> None:
    files = write_model(tmp_path / "tiny"), write_text(tmp_path / "text.txt")
    calm, out = tmp_path / "calm" / "fast", tmp_path / "killed" / "fast"
    out.parent.mkdir()
    counts = run(files, calm, "never")
    drawn = random.Random(4)
    early = drawn.randrange(2, counts["put"] // 2)
    for moment in ("report 30", f"put {early}", "fsync 1", f"fsync {counts['fsync']}", "rename 2"):
        run(files, out, moment)
        assert [p.name for p in out.parent.iterdir()] == ["fast.work"], moment
    again = run(files, out, "never")
    assert again.get("put", 0) < counts["put"] / 4, "what was measured before a kill is measured again"
    assert [p.name for p in out.parent.iterdir()] == ["fast"]
    names = sorted(p.name for p in calm.iterdir())
    assert names == sorted(p.name for p in out.iterdir())
    for name in names:
        if not name.startswith("report"):  # which tell of seconds
            assert (out / name).read_bytes() == (calm / name).read_bytes(), name
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (calm, out))
    assert first["tensors"] == second["tensors"]
    assert first["verdict"] == second["verdict"]
