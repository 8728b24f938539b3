"""The same weights for every engine: made or read once, written as each one's input, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hasten import checkpoint, formats
from hasten.backends.host import cache_folder
from hasten.bench import peers
from hasten.bench.peers.common import Environment, Job, PeerError, Prepared, Report, Runner, Variant, Workload, install
from hasten.bench.servers import Server
from hasten.bench.vocabulary import write_tokenizer
from hasten.bench.work import Work, count
from hasten.checkpoint.plain import random_tensors, write_plain
from hasten.engine import memory
from hasten.errors import OutputError

SEED = 0
Choice = dict[str, Any]
Command = Callable[[Workload, Choice], list[str]]


@dataclass
class Contender:
    """An engine with the weights in one form. Its process is started when it is first asked for."""

    name: str
    peer: str
    """The peer's name, or "hasten"."""
    variant: Variant
    prepared: Prepared
    version: str
    start: Callable[[], Runner]
    choices: Callable[[Workload], list[dict[str, Any]]]
    load: dict[str, Any] = field(default_factory=dict)
    warm: bool = False
    """It has run something, so the next measurement does not begin cold."""
    serve: Command | None = None
    """Its server's command; None where it has none."""
    listen: Callable[[list[str]], Server] | None = None
    _runner: Runner | None = None
    _server: tuple[tuple[str, Choice], Server] | None = None

    @property
    def runner(self) -> Runner:
        """The process that stays, with the model loaded. Raises PeerError."""
        if self._runner is None:
            runner = self.start()
            try:
                runner.call("load", **self.load)
            except PeerError:
                runner.close()
                raise
            self._runner = runner
        return self._runner

    def server(self, workload: Workload, choice: Choice) -> Server:
        """The process that serves for `workload`, set to `choice`; any other is ended. Raises PeerError."""
        if self._server and self._server[0] == (workload.name, choice):
            return self._server[1]
        self.close_server()
        assert self.serve
        assert self.listen
        self._server = (workload.name, choice), self.listen(self.serve(workload, choice))
        return self._server[1]

    def close_server(self) -> None:
        if self._server:
            self._server[1].close()
        self._server = None

    def close(self) -> None:
        self.close_server()
        if self._runner is not None:
            self._runner.close()
        self._runner, self.warm = None, False


@dataclass(frozen=True)
class Field:
    """All that take part, and those that could not: {"peer", "reason"} each."""

    contenders: list[Contender]
    missing: list[dict[str, str]]
    works: dict[int, Work]
    """For each class of bits, the work of hasten's graph in it."""


def cache_directory() -> Path:
    """Where peers' environments and their inputs are kept: $XDG_CACHE_HOME/hasten, or ~/.cache/hasten.

    Raises OutputError for a user without a home.
    """
    if folder := cache_folder():
        return folder
    raise OutputError("there is no cache folder to keep peers in: this user has no home", "set XDG_CACHE_HOME")


def bits_class(bits_per_weight: float) -> int:
    """Which of the peers' sizes (4, 8 or 16 bits) a model is compared with: the nearest one that is not smaller."""
    return next((bits for bits in (4, 8) if bits_per_weight <= bits * 1.25), 16)


def folder_for(model: checkpoint.Model, random: bool, cache: Path) -> Path:
    """Where the inputs of these weights lie: named by their config and, if they are not random, by their files."""
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    if random:
        digest.update(f"random {SEED}, with a tokenizer".encode())
    else:
        for file in sorted(model.path.glob("*.safetensors")):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    name = Path(model.source).name or "model"
    return cache / "inputs" / f"{name}-{'random-' if random else ''}{digest.hexdigest()[:12]}"


def gather(
    model: checkpoint.Model,
    names: Sequence[str],
    workloads: Sequence[Workload],
    *,
    random: bool,
    format_names: Sequence[str],
    kv_format: str,
    version: str,
    threads: int,
    cache: Path,
    logs: Path,
    report: Report,
) -> Field:
    """Prepare everyone. `model` was opened without weights if `random`; `kv_format` and `version` are hasten's.

    Raises what writing and packing raises.
    """
    folder = folder_for(model, random, cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be made: {error.strerror}") from None
    shared = _checkpoint(model, random, folder, report)
    load = {
        "threads": threads,
        "context": max(w.length for w in workloads),
        "tokens": max(w.batch * (w.length + 64) for w in workloads),
        "batch": max(w.batch for w in workloads),
    }
    start = model if not format_names and not random else shared
    ours = _hasten(start, format_names, folder, {**load, "kv_format": kv_format}, version, logs, report)
    works = {c.variant.bits: _work(c) for c in ours}
    contenders, missing = list(ours), []
    for name in names:
        job_folder = folder / name
        job_folder.mkdir(exist_ok=True)
        home = Environment(cache / "peers" / name.replace(".", "_"), report)
        job = Job(shared, shared.path, job_folder, home, threads, report)
        found, lacking = _peer(name, job, sorted(works), load, logs)
        contenders += found
        missing += lacking
    return Field(contenders, missing, works)


def _checkpoint(model: checkpoint.Model, random: bool, folder: Path, report: Report) -> checkpoint.Model:
    """The weights as a Hugging Face directory: the model's own where it is one."""
    if model.kind == "huggingface":
        return model
    path = folder / "checkpoint"
    if not path.exists():
        report("writing the shared weights", 0, 1)
        write_plain(path, model, random_tensors(model, SEED) if random else lambda spec: model.tensor(spec.name))
        if not (path / "tokenizer.json").exists():
            write_tokenizer(path, model.graph.vocabulary)
        report("writing the shared weights", 1, 1)
    return checkpoint.open(str(path))


def _hasten(
    model: checkpoint.Model,
    names: Sequence[str],
    folder: Path,
    load: dict[str, Any],
    version: str,
    logs: Path,
    report: Report,
) -> list[Contender]:
    made = []
    for name in names or ("",):
        path = _packed(model, name, folder, report) if name else model.location
        opened = checkpoint.open(str(path))
        shown = name or "/".join(sorted(set(opened.formats.values())))
        work = _count(opened, load["kv_format"])
        variant = Variant(shown, bits_class(work.bits_per_weight))
        prepared = Prepared({"path": str(path)}, work.step_bytes, opened.bytes_on_disk, work.kv_bytes)
        ours = _contender("hasten", variant, prepared, version, sys.executable, {}, load, logs, _no_choice, report)
        ours.serve = partial(_serve, path, load)
        made.append(ours)
    return made


def _packed(model: checkpoint.Model, name: str, folder: Path, report: Report) -> Path:
    """An artifact of every matrix in one format, each value rounded to the nearest."""
    path, format = folder / f"hasten-{name}", formats.get(name)
    if path.exists():
        return path
    weights: dict[str, Any] = {}
    for done, spec in enumerate(model.graph.weights.values()):
        report(f"packing {name}", done, len(model.graph.weights))
        values = model.tensor(spec.name)
        weights[spec.name] = format.pack(values) if spec.is_matrix else values
    report(f"packing {name}", len(weights), len(weights))
    return checkpoint.write_artifact(path, model, weights, {}, {})


def _work(contender: Contender) -> Work:
    return _count(checkpoint.open(contender.prepared.settings["path"]), contender.load["kv_format"])


def _count(model: checkpoint.Model, kv_format: str) -> Work:
    return count(model.graph, model.weights(), memory.kv_format(model.formats.values(), kv_format, model.kv_formats))


def _peer(
    name: str, job: Job, bits: Sequence[int], load: dict[str, Any], logs: Path
) -> tuple[list[Contender], list[dict[str, str]]]:
    peer = peers.get(name)
    try:
        version = str(install(peer, job.home)["version"])
    except PeerError as error:
        return [], [{"peer": name, "reason": f"not installed: {error}"}]
    variants = {v.name: v for b in bits for v in peer.variants(b)}
    made, missing = [], []
    for variant in variants.values():
        try:
            prepared = peer.prepare(job, variant)
        except PeerError as error:
            missing.append({"peer": f"{name} {variant.name}", "reason": f"not prepared: {error}"})
            continue
        environment, python = peer.environment(job.home), job.home.python
        choices = _choices(peer, variant)
        one = _contender(name, variant, prepared, version, python, environment, load, logs, choices, job.report)
        if hasattr(peer, "serve") and variant.mix == "alike":
            one.serve = partial(peer.serve, job, prepared)
        made.append(one)
    return made, missing


def _choices(peer: Any, variant: Variant) -> Callable[[Workload], list[dict[str, Any]]]:
    def choices(workload: Workload) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = peer.choices(workload, variant)
        return found

    return choices


def _no_choice(workload: Workload) -> list[dict[str, Any]]:
    return [{}]


def _contender(
    peer: str,
    variant: Variant,
    prepared: Prepared,
    version: str,
    python: Any,
    environment: dict[str, str],
    load: dict[str, Any],
    logs: Path,
    choices: Callable[[Workload], list[dict[str, Any]]],
    report: Report,
) -> Contender:
    name, script = f"{peer} {variant.name}", f"run_{peer.replace('.', '_')}.py"
    if peer == "hasten":  # it must find this package, installed or not
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def start() -> Runner:
        return Runner(
            python, script, logs / f"{name.replace(' ', '-').replace('/', '-')}.log", environment, report, name
        )

    def listen(command: list[str]) -> Server:
        return Server(command, environment, logs / f"{name.replace(' ', '-').replace('/', '-')}-server.log", report)

    return Contender(
        name, peer, variant, prepared, version, start, choices, {**load, **prepared.settings}, listen=listen
    )


def _serve(path: Path, load: Mapping[str, Any], workload: Workload, choice: Choice) -> list[str]:
    """The command of hasten's own server."""
    sizes = {"context": workload.length, "max-batch": workload.batch, "threads": load["threads"]}
    given = {**sizes, "kv-format": load["kv_format"], "port": "{port}"}
    command = [sys.executable, "-m", "hasten", "serve", str(path)]
    return command + [part for name, value in given.items() for part in (f"--{name}", str(value))]


def discard(model: checkpoint.Model, random: bool, cache: Path) -> None:
    """Remove what `gather` wrote for these weights."""
    shutil.rmtree(folder_for(model, random, cache), ignore_errors=True)


def check(names: Sequence[str], format_names: Sequence[str]) -> None:
    """Raise InputError or FormatError for a peer or a format that is none, before anything is loaded."""
    for name in names:
        peers.get(name)
    for name in format_names:
        formats.get(name)
