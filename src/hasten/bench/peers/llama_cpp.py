"""llama.cpp, from the source package of llama-cpp-python: its libraries for this machine's processor, and its tools."""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from hasten.bench.peers.common import Environment, Job, PeerError, Prepared, Variant, Workload, once
from hasten.checkpoint.gguf import KINDS, write_gguf

PACKAGE = "llama-cpp-python"
TOOLS = ("llama-bench", "llama-batched-bench")
SERVER = "llama-server"
QUALITY = ("llama-quantize", "llama-imatrix")
"""What scripts/quality.py asks for."""
TYPES = {4: "q4_0", 8: "q8_0", 16: "f16"}
CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    **dict.fromkeys(("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI"), "OFF"),
}


def install(home: Environment) -> None:
    """One native build of the libraries and the tools, which the binding loads too."""
    home.venv()
    home.pip("install", "cmake", "ninja", "numpy", "typing-extensions", "diskcache", "jinja2", "scikit-build-core")
    source = _source(home)
    options = [f"-D{name}={value}" for name, value in CMAKE.items()]
    build = ["cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(home.path / "build"), "-G", "Ninja"]
    home.run([*build, *options], "llama.cpp: configuring")
    targets = ["cmake", "--build", str(home.path / "build"), "--parallel", str(os.cpu_count() or 1), "--target"]
    home.run([*targets, "llama"], "llama.cpp: building the libraries")
    with contextlib.suppress(PeerError):  # without tools the C interface measures, and every figure says so
        home.run([*targets, *TOOLS], "llama.cpp: building its tools")
    for names in ([SERVER], QUALITY):
        with contextlib.suppress(PeerError):
            home.run([*targets, *names], f"llama.cpp: building {names[0]}")


def _source(home: Environment) -> Path:
    """The unpacked source package."""
    folder = home.path / "source"
    if (folder / "vendor" / "llama.cpp" / "CMakeLists.txt").exists():
        return folder
    with_download = home.path / "download"
    home.pip("download", "--no-deps", "--no-build-isolation", "--no-binary", PACKAGE, "-d", str(with_download), PACKAGE)
    (archive,) = with_download.glob("*.tar.gz")
    with tarfile.open(archive) as package:
        package.extractall(with_download, filter="data")
    (unpacked,) = (p for p in with_download.iterdir() if p.is_dir())
    unpacked.rename(folder)
    shutil.rmtree(with_download)
    return folder


def _tools(home: Environment) -> Path:
    return home.path / "build" / "bin"


def version(home: Environment) -> str:
    facts = (home.path / "source" / "PKG-INFO").read_text(encoding="utf-8")
    return next(line.removeprefix("Version: ") for line in facts.splitlines() if line.startswith("Version: "))


def environment(home: Environment) -> dict[str, str]:
    """The binding is imported from its source, and told to load the libraries that were built beside the tools."""
    return {"PYTHONPATH": str(home.path / "source"), "LLAMA_CPP_LIB_PATH": str(_tools(home))}


def variants(bits: int) -> list[Variant]:
    name = TYPES[bits].upper()
    alike = Variant(name, bits, settings={"kind": TYPES[bits]})
    mixed = Variant(f"{name} default mix", bits, "default", {"kind": TYPES[bits]})
    return [alike, mixed] if bits == 4 else [alike]  # of 8 and 16 bits its own mix has one type too


def prepare(job: Job, variant: Variant) -> Prepared:
    kind = KINDS[variant.settings["kind"]]
    path = job.folder / f"{kind.name}{'' if variant.mix == 'alike' else '-default'}.gguf"
    if not path.exists():
        if variant.mix == "alike":
            write_gguf(job.model, path, kind.name, job.report)
        else:
            _default_mix(job, path, kind.file_type)
    size = path.stat().st_size
    embedding = kind.nbytes(1, job.embedding) if job.embedding else 0
    tools = _tools(job.home)
    settings: dict[str, Any] = {"path": str(path)}
    if all((tools / name).exists() for name in TOOLS):
        settings["tools"] = str(tools)
    return Prepared(settings, size - embedding, size)


def _default_mix(job: Job, path: Path, file_type: int) -> None:
    half = job.folder / "f16.gguf"
    if not half.exists():
        write_gguf(job.model, half, "f16", job.report)
    job.report("llama.cpp quantises", 0, 1)
    part = path.with_suffix(".part")
    arguments = {"source": str(half), "target": str(part), "file_type": file_type, "threads": job.threads}
    once(job.home, "run_llama_cpp.py", "quantize", environment=environment(job.home), **arguments)
    part.rename(path)
    job.report("llama.cpp quantises", 1, 1)


def serve(job: Job, prepared: Prepared, workload: Workload, choice: dict[str, Any]) -> list[str]:
    """A slot a client, each with room for its longest request. Raises PeerError where the server was not built."""
    program = _tools(job.home) / SERVER
    if not program.exists():
        raise PeerError(f"llama-server is not built (see {job.home.log}); without {job.home.ready} it is tried again")
    given = {
        "model": prepared.settings["path"],
        "port": "{port}",
        "parallel": workload.batch,
        "ctx-size": workload.batch * (-(-workload.length // 256) * 256),
        "threads": job.threads,
        "threads-batch": job.threads,
        "flash-attn": "on" if choice["flash"] else "off",
    }
    return [str(program), *(part for name, value in given.items() for part in (f"--{name}", str(value)))]


def choices(workload: Workload, variant: Variant) -> list[dict[str, Any]]:
    """Flash attention off and on; far into a context, with a cache of 8 bits too, which needs it."""
    if workload.kind == "depth":
        return [{"flash": False}, {"flash": True}, {"flash": True, "cache": "q8_0"}]
    if workload.kind == "ttft-warm":
        return [{"flash": False, "via": "binding"}, {"flash": True, "via": "binding"}]
    return [{}] if workload.kind == "ttft-cold" else [{"flash": False}, {"flash": True}]
