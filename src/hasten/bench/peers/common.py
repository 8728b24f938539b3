"""What peers share: an environment of their own, a process that runs them, and words for what is measured."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.checkpoint import Model

RUNNERS = Path(__file__).resolve().parent.parent / "runners"
Report = Callable[[str, int, int], None]


class PeerError(Exception):
    """A peer that cannot be installed, prepared or run, and why. Reported beside the figures; the bench goes on."""


@dataclass(frozen=True)
class Variant:
    """One way in which an engine holds the weights."""

    name: str
    """As the tables show it, the peer's name before it."""
    bits: int
    """4, 8 or 16: what it is compared with."""
    mix: str = "alike"
    """ "alike": head and embeddings as the rest; "default": the peer's own choice."""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A peer's input: what its runner loads, and bytes that a step reads and that the file holds."""

    settings: dict[str, Any]
    step_bytes: int
    file_bytes: int
    kv_bytes: float = 2
    """Bytes of one number in its cache."""


@dataclass(frozen=True)
class Workload:
    """Something to time: `tokens` of prompt; `batch` sequences from `depth`, each `new` steps; or, of servers, `batch`
    clients whose prompts have up to `tokens`, and answers `new`."""

    name: str
    kind: str
    """prefill, decode, depth, ttft-cold, ttft-warm or serve."""
    tokens: int = 0
    batch: int = 1
    depth: int = 0
    new: int = 0

    @property
    def length(self) -> int:
        """Tokens that the context must hold."""
        return max(self.tokens, self.depth) + max(self.new, 1)


@dataclass(frozen=True)
class Environment:
    """A directory with a virtual environment, and a log of how it came about. Made once, then reused."""

    path: Path
    report: Report = lambda stage, done, total: None

    @property
    def python(self) -> Path:
        return self.path / "venv" / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.path / "install.log"

    @property
    def ready(self) -> Path:
        """Written last: an environment without it is made again, from what is already there."""
        return self.path / "installed.json"

    def venv(self) -> None:
        if not self.version_of("pip"):  # none yet, or one that was cut short
            self.run([sys.executable, "-m", "venv", "--clear", str(self.path / "venv")], "making an environment")

    def pip(self, *arguments: str, **environment: str) -> None:
        """pip with its own configuration (PIP_CONSTRAINT, PIP_EXTRA_INDEX_URL ...) and these variables."""
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]
        self.run(command, f"{self.path.name}: pip {arguments[0]}", **environment)

    def run(self, command: list[str], stage: str, **environment: str) -> None:
        """Run until done, with a report every second. Raises PeerError with the last line that tells something."""
        self.path.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join([str(self.path / "venv" / "bin"), os.environ.get("PATH", "")])
        given = {**os.environ, "PATH": paths, **environment}
        with open(self.log, "a+b") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=given)
            seconds = 0
            while True:
                self.report(f"{stage} (seconds)", seconds, seconds + 1)
                try:
                    status = process.wait(1)
                    break
                except subprocess.TimeoutExpired:
                    seconds += 1
                except BaseException:
                    process.kill()
                    process.wait()
                    raise
            log.seek(begin)
            words = last_words(log.read().decode(errors="replace"))
        if status:
            raise PeerError(f"{Path(command[0]).name} failed: {words or f'exit status {status}'} (see {self.log})")

    def version_of(self, package: str) -> str:
        """The installed version of a package; "" where it is not."""
        code = f"from importlib.metadata import version; print(version({package!r}))"
        if not self.python.exists():
            return ""
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return done.stdout.strip()


def last_words(text: str) -> str:
    """The last line that speaks of an error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:300]


def install(peer: Any, home: Environment) -> dict[str, Any]:
    """The peer's environment, made where it is not there: {"version": ...}. Raises PeerError."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(home.ready.read_text())
        if isinstance(found, dict) and "version" in found:
            return found
    try:
        home.path.mkdir(parents=True, exist_ok=True)
        peer.install(home)
        facts = {"version": peer.version(home)}
        staging = home.ready.with_suffix(".part")
        staging.write_text(json.dumps(facts) + "\n")
        os.replace(staging, home.ready)
    except OSError as error:
        raise PeerError(f"{home.path} cannot be written: {error.strerror or error}") from None
    return facts


@dataclass(frozen=True)
class Job:
    """What a peer prepares its input from."""

    model: Model
    """The shared weights, opened from `checkpoint`."""
    checkpoint: Path
    """The same as a Hugging Face directory."""
    folder: Path
    """Where the peer's files go; what is there from an earlier run is reused."""
    home: Environment
    threads: int
    report: Report

    @property
    def embedding(self) -> int:
        """Numbers in an embedding that a step reads one row of; 0 where it is the head too."""
        tied = "lm_head.weight" not in self.model.graph.weights
        return 0 if tied else self.model.graph.vocabulary * self.model.graph.hidden


class Runner:
    """A process that answers calls, one at a time (bench/runners/protocol.py). Its stderr goes to a file.

    `report` hears each second that an answer takes.
    """

    def __init__(
        self, python: str | Path, script: str, log: Path, environment: Mapping[str, str], report: Report, name: str = ""
    ) -> None:
        self.name, self.log, self._report = name or script, log, report
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                [str(python), str(script if os.path.isabs(script) else RUNNERS / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
            )

    def call(self, call: str, **arguments: Any) -> dict[str, Any]:
        """Raises PeerError with what the runner says, or its last words where it has died."""
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answer(call)
        except BrokenPipeError:
            line = b""
        if not line:
            words = last_words(self.log.read_text(errors="replace")[-4000:])
            raise PeerError(f"{self.name} died with status {self._process.wait()}: {words}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        return answer

    def _answer(self, call: str) -> bytes:
        """One line; there is never more than one under way, so none hides in a buffer."""
        assert self._process.stdout
        seconds = 0
        while not select.select([self._process.stdout], [], [], 1.0)[0]:
            seconds += 1
            self._report(f"{self.name}: {call} (seconds)", seconds, seconds + 1)
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def once(
    home: Environment, script: str, call: str, environment: Mapping[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
    """One call to a runner of its own."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(home.python, script, Path(folder) / "log", environment or {}, home.report, home.path.name)
        try:
            return runner.call(call, **arguments)
        finally:
            runner.close()
