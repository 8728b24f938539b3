"""The NEON kernels, cross-compiled and emulated: what native/tests checks, on processors that we lack."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cross-aarch64"
COMPILER = "aarch64-linux-gnu-g++"
LIBRARIES = "/usr/aarch64-linux-gnu"
TABLES = ["neon_i8mm", "neon_dotprod", "neon", "scalar"]
PROCESSORS = {"max": TABLES, "neoverse-n1": TABLES[1:], "cortex-a53": TABLES[2:]}
"""The tables that each runs, best first. Emulation is slow: a table is tested on the least processor that has it."""


def tool(name: str) -> str:
    """The program of that name on the path or beside this Python; skips the test where there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed; .ci/run installs it where it may")
    return found


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    return [tool("qemu-aarch64"), "-L", LIBRARIES]


@pytest.fixture(scope="module")
def program() -> Path:
    """native/tests for arm64, built once and again when a source changes."""
    compiler, cmake = tool(COMPILER), tool("cmake")
    cached = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    configure = [
        cmake, "-S", ROOT, "-B", BUILD, "-DHASTEN_PYTHON=OFF", "-DHASTEN_WERROR=ON", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}", *cached,
    ]  # fmt: skip
    build = [cmake, "--build", BUILD, "--target", "test_kernels", "-j", str(os.cpu_count() or 1)]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD / "test_kernels"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "tables"), [("max", TABLES[:1]), ("neoverse-n1", TABLES[1:2]), ("cortex-a53", TABLES[2:])]
)
def test_kernels_are_the_formulas(emulator, program, processor, tables):
    done = subprocess.run([*emulator, "-cpu", processor, program, *tables], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "quantise ok" in line] == tables, done.stdout


@pytest.mark.parametrize("processor", PROCESSORS)
def test_each_processor_has_its_tables(emulator, program, processor):
    done = subprocess.run([*emulator, "-cpu", processor, program, "avx2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"this processor runs {' '.join(PROCESSORS[processor])}\n" in done.stderr


@pytest.mark.slow
def test_planted_faults_are_noticed(emulator, program):
    done = subprocess.run([*emulator, "-cpu", "max", program, "--faults", "neon_i8mm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planted faults noticed" in done.stdout
