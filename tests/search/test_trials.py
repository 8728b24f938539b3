from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.errors import OutputError
from hasten.search.trials import Trials, digest


def test_measures_once(tmp_path: Path) -> None:
    calls = []
    folder = tmp_path / "out.work"
    for _ in range(2):
        with Trials(folder, keep=True) as trials:
            key = {"shape": [1, 2], "format": "x"}
            value = trials.measure("cost", key, lambda: calls.append(1) or {"seconds": 0.1})
            assert value == {"seconds": 0.1}
            assert trials.get("cost", {"format": "x", "shape": [1, 2]}) == value
            assert trials.get("loss", {"shape": [1, 2], "format": "x"}) is None
    assert len(calls) == 1


def test_folder_goes_on_success_and_stays_on_failure(tmp_path: Path) -> None:
    folder = tmp_path / "out.work"

    def interrupted() -> None:
        with Trials(folder) as trials:
            trials.put("a", 1, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert folder.exists()
    with Trials(folder) as trials:
        assert trials.get("a", 1) == 2
    assert not folder.exists()


def test_survives_a_kill(tmp_path: Path) -> None:
    """The writer is killed without warning right after its second put; both are there for the next run."""
    folder = tmp_path / "out.work"
    code = (
        "import os, signal, sys; from pathlib import Path; from hasten.search.trials import Trials\n"
        "t = Trials(Path(sys.argv[1])); t.put('a', 1, 'one'); t.put('a', 2, 'two')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    source = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env={**os.environ, "PYTHONPATH": str(source)})
    assert done.returncode == -signal.SIGKILL
    with Trials(folder) as trials:
        assert [trials.get("a", 1), trials.get("a", 2)] == ["one", "two"]


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    with Trials(tmp_path / "w"), pytest.raises(OutputError, match="another run"):
        Trials(tmp_path / "w")


def test_damaged_and_unwritable(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "trials.sqlite").write_bytes(b"this is no database, not at all" * 100)
    with pytest.raises(OutputError, match="damaged"):
        Trials(tmp_path / "w")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot keep"):
        Trials(tmp_path / "file" / "w")


def test_digest_ignores_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
