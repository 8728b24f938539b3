"""Compresses a model block by block: one block's weights and statistics are in memory at a time, whatever the depth.

What flows into a block comes out of the blocks before it as they were compressed, so later blocks can make up for what
earlier ones lost (Frantar et al. 2022, section 4). Every finished section is on disk; a run that was killed goes on
after the last of them, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hasten import formats
from hasten.backends.batch import Float32, Int32, Limits
from hasten.backends.cache import KvFormat
from hasten.checkpoint import Model, files, safetensors
from hasten.checkpoint.write import stored_arrays
from hasten.compress import calibrate, methods
from hasten.compress.calibrate import Report
from hasten.compress.methods import Inputs
from hasten.compress.recipe import Choice
from hasten.compress.run import needs
from hasten.compress.statistics import Hidden, Statistics
from hasten.errors import CheckpointError, FormatError, OutputError
from hasten.formats import Weight
from hasten.graph.graph import Graph

VERSION = 1
"""Of what a work folder holds."""
COPIES = 10
"""Float32 copies of the largest matrix that a method holds at once, its working space included."""


@dataclass(frozen=True)
class Task:
    """What is to be done: `windows` are what is calibrated on, none where no method asks for it."""

    model: Model
    choices: Mapping[str, Choice]
    windows: Sequence[Int32]
    kv_format: KvFormat
    threads: int = 0

    def limits(self) -> Limits:
        return calibrate.limits_for(self.windows, self.kv_format, self.threads)

    def facts(self) -> dict[str, Any]:
        """What the work of another run must agree with to be taken up."""
        return {
            "version": VERSION,
            "model": files.fingerprint(self.model.path),
            "structure": self.model.structure.json(),
            "context": self.model.graph.context,
            "choices": {name: list(asdict(c).values()) for name, c in self.choices.items()},
            "windows": hashlib.sha256(b"".join(w.tobytes() + b"|" for w in self.windows)).hexdigest(),
            "kv_format": self.kv_format if isinstance(self.kv_format, str) else list(self.kv_format),
        }


def compress(task: Task, folder: Path, report: Report | None = None) -> dict[str, Weight | Float32]:
    """Every weight of the model, the chosen matrices replaced; those lie in `folder`, mapped.

    Takes up what `folder` holds of the same task. Raises OutputError where it cannot be written, FormatError and
    InputError naming the matrix that a method cannot do, CheckpointError where what flows is not finite.
    """
    work = Work(folder, task.facts())
    count = len(task.model.graph.blocks) + 1
    asked = needs(task.choices)
    hidden: Hidden | None = None
    for index in range(count):
        if report:
            report("compressing", index, count)
        if work.has(index):
            continue
        if task.windows and hidden is None:
            hidden = work.hidden(index, task.windows) if index else start(task)
        hidden = _section(task, index, asked, hidden, work)
    if report:
        report("compressing", count, count)
    return _gathered(task, work, count)


def _section(
    task: Task, index: int, asked: Mapping[str, methods.Needs], hidden: Hidden | None, work: Work
) -> Hidden | None:
    """Compress block `index`, or what follows the last one; returns what it then hands on."""
    graph = task.model.graph
    last = index == len(graph.blocks)
    section = graph.tail(index) if last else graph.block(index)
    own = {name: task.model.weight(name) for name in section.weights}
    statistics = Statistics(tokens=sum(len(w) for w in task.windows))
    wanted = [name for name in section.weights if asked.get(name) == "hessian"]
    if hidden is not None and any(asked.get(name, "nothing") != "nothing" for name in section.weights):
        through = calibrate.head_input(graph) if last else section
        readers = calibrate.linear_inputs(section)
        calibrate.gather(through, own, task.windows, hidden, task.limits(), statistics, wanted, readers)
    mine = [spec.name for spec in section.matrices()]
    if last:  # tables that no section multiplies by: embeddings apart from the head
        mine += [s.name for s in graph.matrices() if s.name not in mine and not _in_block(graph, s.name)]
    packed = {n: pack(task, n, statistics.inputs(n)) for n in mine if not task.choices[n].is_original}
    if hidden is not None and not last:
        hidden = calibrate.run(section, own | packed, task.windows, hidden, task.limits())
        work.keep_hidden(index + 1, hidden)
    work.keep(index, packed)
    return hidden


def pack(task: Task, name: str, inputs: Inputs | None) -> Weight:
    """One matrix as its choice says. A table that is only looked up has no inputs: its method needs none."""
    choice, format = task.choices[name], formats.get(task.choices[name].format)
    method = choice.method
    if inputs is None and methods.get(method).NEEDS == "hessian":
        method = methods.best_for(format, hessian=False)
    try:
        return methods.apply(method, task.model.tensor(name), format, inputs or methods.NOTHING)
    except FormatError as error:
        raise FormatError(f"{name}: {error.message}", error.hint) from None


def start(task: Task) -> Hidden:
    """Hidden states at the first block's input."""
    graph = task.model.graph
    front = [name for node in graph.nodes[: graph.blocks[0].start] for name in node.weights]
    return calibrate.embed(graph, {n: task.model.weight(n) for n in front}, task.windows, task.limits())


def _in_block(graph: Graph, name: str) -> bool:
    return any(name in node.weights for b in graph.blocks for node in graph.nodes[b.start : b.stop])


def _gathered(task: Task, work: Work, count: int) -> dict[str, Weight | Float32]:
    weights: dict[str, Weight | Float32] = {}
    for index in range(count):
        weights |= work.packed(index, task)
    return {name: weights[name] if name in weights else task.model.weight(name) for name in task.model.graph.weights}


class Work:
    """The folder in which finished sections lie, as safetensors files, with the hidden states after the last one."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        file = folder / "task.json"
        try:
            if folder.is_dir() and (not file.exists() or json.loads(file.read_text()) != facts):
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                files.write_whole(file, json.dumps(facts).encode())
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot work in {folder}: {error}", "remove it, or choose another output") from None

    def _section(self, index: int) -> Path:
        return self.folder / f"section-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        return self._section(index).exists()

    def keep(self, index: int, packed: Mapping[str, Weight]) -> None:
        arrays: dict[str, Any] = {}
        for name, weight in packed.items():
            arrays |= stored_arrays(name, weight)
        part = self.folder / "section.part"
        try:
            part.unlink(missing_ok=True)
            safetensors.write(part, arrays)
            part.replace(self._section(index))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {self.folder}: {error.strerror}", "is the disk full?") from None

    def packed(self, index: int, task: Task) -> dict[str, Weight]:
        """What `keep` kept, mapped."""
        file = safetensors.File(self._section(index))
        found = {}
        for spec in task.model.graph.matrices():
            choice = task.choices[spec.name]
            if choice.is_original:
                continue
            format = formats.get(choice.format)
            arrays = {part: f"{spec.name}.{part}" for part in format.array_specs(*spec.shape)}
            if all(n in file.tensors for n in arrays.values()):
                found[spec.name] = format.load({p: file.array(n) for p, n in arrays.items()}, spec.shape)  # type: ignore[arg-type]
        return found

    def keep_hidden(self, index: int, hidden: Hidden) -> None:
        """Of block `index`'s input; those of the block before stay until its section is kept."""
        part = self.folder / "hidden.part"
        try:
            with part.open("wb") as stream:
                np.save(stream, np.concatenate(hidden))
            part.replace(self._hidden(index))
            self._hidden(index - 2).unlink(missing_ok=True)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {self.folder}: {error.strerror}", "is the disk full?") from None

    def hidden(self, index: int, windows: Sequence[Int32]) -> Hidden:
        """What `keep_hidden` kept. Raises CheckpointError where it is not of these windows."""
        flat = np.load(self._hidden(index))
        ends = np.cumsum([len(w) for w in windows])
        if flat.dtype != np.float32 or len(flat) != ends[-1]:
            raise CheckpointError(f"{self._hidden(index)} is damaged", f"remove {self.folder} and start again")
        return np.split(flat, ends[:-1])

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05d}.npy"
