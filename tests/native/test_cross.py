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
PROCESSORS = {
    "max": ["neon_i8mm", "neon_dotprod", "neon", "scalar"],
    "neoverse-n1": ["neon_dotprod", "neon", "scalar"],
    "cortex-a53": ["neon", "scalar"],
}


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
@pytest.mark.parametrize("processor", PROCESSORS)
def test_kernels_are_the_formulas(emulator, program, processor):
    done = subprocess.run([*emulator, "-cpu", processor, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = [line.split(":")[0] for line in done.stdout.splitlines() if "quantise ok" in line]
    assert tables == PROCESSORS[processor], done.stdout


@pytest.mark.slow
def test_planted_faults_are_noticed(emulator, program):
    done = subprocess.run([*emulator, "-cpu", "max", program, "--faults", "neon_i8mm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planted faults noticed" in done.stdout


def test_a_table_that_the_processor_lacks_is_refused(emulator, program):
    done = subprocess.run([*emulator, "-cpu", "cortex-a53", program, "neon_i8mm"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "neon_i8mm is not available here; this processor runs neon scalar" in done.stderr
