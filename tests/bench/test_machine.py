from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hasten.bench import machine

MiB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_an_instruction_set_that_is_not_there() -> None:
    command = [sys.executable, "-m", "hasten", "machine"]
    done = subprocess.run(command, env={**os.environ, "HASTEN_ISA": "foo"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: HASTEN_ISA=foo is not available here")
    assert "scalar" in done.stderr.splitlines()[1]


def test_last_level_cache_is_the_largest(tmp_path: Path) -> None:
    base = "sys/devices/system/cpu/cpu0/cache"
    root = write(
        tmp_path, {f"{base}/index0/size": "32K\n", f"{base}/index2/size": "1M", f"{base}/index3/size": "36608K"}
    )
    assert machine.last_level_cache(root) == 36608 * 1024
    assert machine.last_level_cache(tmp_path / "nothing") == 0


def test_cpu_name(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name\t: Some  CPU @ 2 GHz\n"})
    assert machine.cpu_name(root) == "Some CPU @ 2 GHz"
    assert machine.cpu_name(tmp_path / "nothing")


def test_best_takes_each_limit_by_itself() -> None:
    a, b = machine.Limits(10, 200, 30, 2), machine.Limits(20, 100, 40, 2)
    assert a.best(b) == machine.Limits(20, 200, 40, 2) == b.best(a)


def test_peak_resident_grows_with_use() -> None:
    before = machine.peak_resident()
    held = bytearray(64 * MiB)
    held[::4096] = b"x" * len(held[::4096])
    assert before > 0
    assert machine.peak_resident() >= before
    assert machine.peak_resident() >= 64 * MiB


def test_describe_and_limits_of_this_machine() -> None:
    here = machine.describe()
    assert here.cores >= 1
    assert here.instruction_set in here.instruction_sets
    assert here.memory_available <= here.memory_total
    measured = machine.limits(seconds=0.02)
    assert measured.threads == here.cores
    # Any machine this runs on reads a gigabyte in ten seconds and none reads ten terabytes in one.
    assert 0.1 < measured.memory_read_gbs < 10_000
    assert 0.1 < measured.int8_gmacs < 1_000_000
    assert 0.1 < measured.bf16_gmacs < 1_000_000
