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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten import formats
from hasten.backends.batch import Float32, Int32, Limits
from hasten.backends.cache import KvFormat
from hasten.backends.host import native_build, sources
from hasten.checkpoint import Model, files, safetensors
from hasten.checkpoint.write import stored_arrays
from hasten.compress import calibrate, folds, gradients, methods
from hasten.compress.calibrate import Report
from hasten.compress.methods import Inputs
from hasten.compress.recipe import Choice
from hasten.compress.run import needs
from hasten.compress.statistics import Hidden, Statistics
from hasten.errors import CheckpointError, FormatError, OutputError, unwritable
from hasten.formats import Weight
from hasten.graph.graph import Graph
from hasten.graph.structure import Structure

New = dict[str, Weight | Float32]

VERSION = 3
"""Of what a work folder holds."""
LIBRARIES = 64 << 20
"""Bytes that linear algebra takes for its own buffers, once."""
FEW = 6
"""Bits under which a matrix is as well looked at in int4."""
KEPT = 4
"""Hidden states go to disk after so many blocks, which a run that is taken up may have to go through again."""
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
    folds: tuple[str, ...] = ()
    """What is folded into weights before they are packed (compress/folds): in each block, or in `model` already."""

    def limits(self) -> Limits:
        return calibrate.limits_for(self.windows, self.kv_format, self.threads)

    def facts(self) -> dict[str, Any]:
        """What the work of another run must agree with to be taken up."""
        return {
            "version": VERSION,
            "build": [native_build(), sources()],
            "model": files.fingerprint(self.model.path),
            "structure": self.model.structure.json(),
            "context": self.model.graph.context,
            "folds": list(self.folds),
            "choices": {name: list(asdict(c).values()) for name, c in self.choices.items()},
            "windows": hashlib.sha256(b"".join(w.tobytes() + b"|" for w in self.windows)).hexdigest(),
            "kv_format": self.kv_format if isinstance(self.kv_format, str) else list(self.kv_format),
        }


def turned(model: Model, names: Sequence[str], choices: Mapping[str, Choice]) -> Model:
    """The model with what `names` says folded into all of it at once; held in float32, in memory."""
    for name in names:
        found = folds.get(name).fold(model.graph, model.tensor, lambda _: None, choices)
        pack = formats.get("f32").pack
        model = model.departing(Structure(), {n: pack(v) if v.ndim == 2 else v for n, v in found.items()})
    return model


def compress(task: Task, folder: Path, report: Report | None = None) -> dict[str, Weight | Float32]:
    """Every weight of the model, the chosen matrices replaced; those lie in `folder`, mapped.

    Takes up what `folder` holds of the same task. Raises OutputError where it cannot be written, FormatError and
    InputError naming the matrix that a method cannot do, CheckpointError where what flows is not finite.
    """
    work = Work(folder, task.facts())
    count = len(task.model.graph.blocks) + 1
    asked = needs(task.choices)
    slopes = work.gradients(task, [name for name, needs in asked.items() if needs == "gradients"], report)
    hidden: Hidden | None = None
    for index in range(count):
        if report:
            report("compressing", index, count)
        if work.has(index):
            continue
        if task.windows and hidden is None:
            hidden = _resumed(task, index, work)
        hidden = _section(task, index, asked, hidden, work, slopes)
    if report:
        report("compressing", count, count)
    return _gathered(task, work, count)


def _resumed(task: Task, index: int, work: Work) -> Hidden:
    """What flows into section `index`: the hidden states kept last, through the blocks since."""
    kept = next((i for i in range(index, 0, -1) if work.has_hidden(i)), 0)
    hidden = work.hidden(kept, task.windows) if kept else start(task)
    for i in range(kept, index):
        section = task.model.graph.block(i)
        own = {name: task.model.weight(name) for name in section.weights}
        hidden = calibrate.run(section, own | work.packed(i, task), task.windows, hidden, task.limits())
    return hidden


def _section(
    task: Task,
    index: int,
    asked: Mapping[str, methods.Needs],
    hidden: Hidden | None,
    work: Work,
    slopes: Mapping[str, Float32],
) -> Hidden | None:
    """Compress block `index`, or what follows the last one; returns what it then hands on."""
    graph = task.model.graph
    last = index == len(graph.blocks)
    section = graph.tail(index) if last else graph.block(index)
    own = {name: task.model.weight(name) for name in section.weights}
    statistics = Statistics(tokens=sum(len(w) for w in task.windows))
    wanted = [name for name in section.weights if asked.get(name) == "hessian"]
    changed: dict[str, Weight | Float32] = {}
    if not last and task.folds:
        changed = _folded(task, section, own, hidden)
        own |= changed
    if hidden is not None and any(asked.get(name, "nothing") != "nothing" for name in section.weights):
        few = [s.name for s in section.matrices() if _few_bits(task.choices[s.name])]
        rough = calibrate.roughly(section, own, few)
        calibrate.look(section, rough, task.windows, hidden, task.limits(), statistics, wanted)
        del rough
    mine = [spec.name for spec in section.matrices()]
    if last:  # tables that no section multiplies by: embeddings apart from the head
        mine += [s.name for s in graph.matrices() if s.name not in mine and not _in_block(graph, s.name)]
    packed: dict[str, Weight | Float32] = {
        n: w for n, w in changed.items() if n not in mine or task.choices[n].is_original
    }
    for name in mine:
        if not task.choices[name].is_original:
            values = dense(changed[name]) if name in changed else task.model.tensor(name)
            known = statistics.inputs(name)
            if name in slopes:
                known = replace(known or methods.NOTHING, gradients=slopes[name])
            packed[name] = pack(task, name, values, known)
    if hidden is not None and not last:
        hidden = calibrate.run(section, own | packed, task.windows, hidden, task.limits())
        if (index + 1) % KEPT == 0:
            work.keep_hidden(index + 1, hidden)
    work.keep(index, packed)
    return hidden


def _few_bits(choice: Choice) -> bool:
    return not choice.is_original and formats.get(choice.format).bits_per_weight(1024, 1024) < FEW


def _folded(task: Task, section: Graph, own: Mapping[str, Weight | Float32], hidden: Hidden | None) -> New:
    """The weights of a block that folding changes, one fold after another, each with the inputs that the last leaves.

    Matrices that are to be packed are float32 until they are, others of the model's own format.
    """
    changed: New = {}
    for name in (n for n in task.folds if not folds.get(n).WHOLE):
        now = {**own, **changed}
        fold, seen = folds.get(name), Statistics(tokens=sum(len(w) for w in task.windows))
        if fold.NEEDS != "nothing" and hidden is not None:
            wanted = list(section.weights) if fold.NEEDS == "hessian" else []
            calibrate.look(section, now, task.windows, hidden, task.limits(), seen, wanted)
        found = fold.fold(section, lambda n, now=now: dense(now[n]), seen.inputs, task.choices)  # type: ignore[misc]
        for weight, values in found.items():
            if values.ndim == 2:
                kept = task.choices[weight].is_original
                changed[weight] = formats.get(task.model.dtype if kept else "f32").pack(values)
            else:
                changed[weight] = values
    return changed


def dense(weight: Weight | Float32) -> Float32:
    """float32 [out, in] or [n]."""
    return weight.dense() if isinstance(weight, Weight) else weight


def pack(task: Task, name: str, values: Float32, inputs: Inputs | None) -> Weight:
    """One matrix as its choice says. A table that is only looked up has no inputs: its method needs none."""
    choice, format = task.choices[name], formats.get(task.choices[name].format)
    method = choice.method
    if inputs is None and methods.get(method).NEEDS == "hessian":
        method = methods.best_for(format, hessian=False)
    try:
        return methods.apply(method, values, format, inputs or methods.NOTHING)
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
        except OSError as error:
            raise unwritable(folder, error) from None
        except ValueError:
            raise OutputError(f"{file} is damaged", f"remove {folder}, or choose another output") from None

    def _section(self, index: int) -> Path:
        return self.folder / f"section-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        return self._section(index).exists()

    def keep(self, index: int, packed: Mapping[str, Weight | Float32]) -> None:
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
            raise unwritable(self.folder, error) from None

    def packed(self, index: int, task: Task) -> dict[str, Weight | Float32]:
        """What `keep` kept, mapped."""
        file = safetensors.File(self._section(index))
        found: dict[str, Weight | Float32] = {}
        for spec in task.model.graph.weights.values():
            if not spec.is_matrix:
                if spec.name in file.tensors:
                    found[spec.name] = file.array(spec.name)
                continue
            choice = task.choices[spec.name]
            format = formats.get(task.model.dtype if choice.is_original else choice.format)
            shape = (spec.shape[0], spec.shape[1])
            arrays = {part: f"{spec.name}.{part}" for part in format.array_specs(*shape)}
            if all(n in file.tensors for n in arrays.values()):
                found[spec.name] = format.load({p: file.array(n) for p, n in arrays.items()}, shape)
        return found

    def gradients(self, task: Task, names: Sequence[str], report: Report | None) -> dict[str, Float32]:
        """Of the model as it was, for the matrices `names`; made once."""
        if not names:
            return {}
        file, part = self.folder / "gradients.npz", self.folder / "gradients.part"
        try:
            if not file.exists():
                with part.open("wb") as stream:
                    np.savez(stream, **gradients.mean_squares(task.model, task.windows, names, report))  # type: ignore[arg-type]
                part.replace(file)
            with np.load(file) as arrays:
                return {name: arrays[name] for name in names}
        except OSError as error:
            part.unlink(missing_ok=True)
            raise unwritable(self.folder, error) from None

    def keep_hidden(self, index: int, hidden: Hidden) -> None:
        """Of block `index`'s input; those before stay until its section is kept."""
        part = self.folder / "hidden.part"
        try:
            with part.open("wb") as stream:
                np.save(stream, np.concatenate(hidden))
            part.replace(self._hidden(index))
            self._hidden(index - 2 * KEPT).unlink(missing_ok=True)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise unwritable(self.folder, error) from None

    def has_hidden(self, index: int) -> bool:
        return self._hidden(index).exists()

    def hidden(self, index: int, windows: Sequence[Int32]) -> Hidden:
        """What `keep_hidden` kept. Raises CheckpointError where it is not of these windows."""
        flat = np.load(self._hidden(index))
        ends = np.cumsum([len(w) for w in windows])
        if flat.dtype != np.float32 or len(flat) != ends[-1]:
            raise CheckpointError(f"{self._hidden(index)} is damaged", f"remove {self.folder} and start again")
        return np.split(flat, ends[:-1])

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05d}.npy"
