"""What a search works on: settings checked, the model opened, texts cut, memory and disk foreseen."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from hasten import checkpoint
from hasten.backends.cache import KvFormat
from hasten.backends.host import native_build
from hasten.bench import machine
from hasten.bench.machine import Machine
from hasten.checkpoint import Model, files
from hasten.compress.calibrate import Weights
from hasten.compress.recipe import Choice
from hasten.engine import memory
from hasten.engine.llm import DEFAULT_CONTEXT
from hasten.errors import InputError, MemoryLimitError, OutputError
from hasten.evaluate import perplexity, tasks
from hasten.evaluate.tasks import Task
from hasten.graph.graph import Graph
from hasten.search import budget as budgets
from hasten.search import objective as objectives
from hasten.search import peers, samples, texts
from hasten.search.budget import Budgets
from hasten.search.clock import Clock
from hasten.search.objective import Objective
from hasten.search.texts import Texts
from hasten.search.trials import Json

Report = Callable[[str, int, int], None]
Note = Callable[[str], None]
VERSION = 4
"""Of the measurements that a search keeps: older ones are not reused after what they mean has changed."""
DEFAULT_BUDGET = "ppl=1%"
CONTENDERS = 3
"""Candidates that are timed, and so held, at once."""
LEAST_PACKED = 1 << 28
"""Bytes of packed matrices worth keeping, whatever the memory."""


@dataclass(frozen=True)
class Settings:
    model: str
    output: Path
    budget: str | tuple[str, ...] = ()
    """None: ppl=1%, or nothing but the target where there is one."""
    calibration: Path | None = None
    eval: Path | None = None
    objective: str | None = None
    """None: of the target, or decode."""
    threads: int = 0
    minutes: float | None = None
    """For all of it."""
    keep_work: bool = False
    keep_shape: bool = False
    """Look at no other shape of the model: GGUF and compressed-tensors cannot say one."""
    batch: int | None = None
    lengths: str | None = None
    """PROMPT:NEW"""
    trace: Path | None = None
    target: str | None = None
    memory_cap: int | None = None
    """Bytes."""
    other: Path | None = None
    """Text of another domain, to see how the chosen candidate does there."""
    peers: Path | None = None
    """A report of `hasten bench --against`, whose points the report shows."""


@dataclass
class Job:
    settings: Settings
    budget: Budgets
    objective: Objective
    model: Model
    graph: Graph
    original: Weights
    texts: Texts
    tasks: dict[Path, Task]
    machine: Machine
    key: Json
    """What every measurement of quality depends on: the model's files, its context, instruction set and kernels."""
    kernels: Json
    """What every time depends on: processor, instruction set and the native module's build."""
    packed: int
    """Bytes of packed matrices that may be kept."""
    report: Report
    note: Note
    threads: int
    clock: Clock
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peers: Json | None = None
    """What `hasten.search.peers` read."""
    before: tuple[Model, Weights] | None = None
    """The model that was given, where the search starts from another shape of it."""
    shape: Json | None = None
    """That shape: its name and what a recipe's `structure` says."""
    others: list[tuple[Json, dict[str, Choice]]] = field(default_factory=list)
    """Candidates of the shape that the search did not end with: as documents have them, and their choices."""
    shapes: list[Json] = field(default_factory=list)
    """All that were measured."""
    caches: Json | None = None
    """What was found of the cache's formats."""
    cache: KvFormat = "auto"
    """Of the candidates."""
    original_allowed: bool = True
    """Whether the original keeps the memory allowed: if not, the best is asked for and not one that is faster."""

    @property
    def given(self) -> Model:
        """The model that was given."""
        return self.before[0] if self.before else self.model

    @property
    def reference(self) -> tuple[Graph, Weights]:
        """What candidates are measured beside: the model that was given."""
        return (self.before[0].graph, self.before[1]) if self.before else (self.graph, self.original)

    @property
    def given_key(self) -> Json:
        """What measurements of the model that was given depend on."""
        return self.key[:-1] if self.before else self.key

    def starting(self, model: Model, shape: Json) -> Job:
        """This job from another shape of its model."""
        return replace(
            self,
            model=model,
            graph=model.graph,
            original=model.weights(self.report),
            before=(self.model, self.original),
            shape=shape,
            key=[*self.key, shape["structure"]],
            caches=None,
            cache="auto",
        )

    def say(self, text: str) -> None:
        """Tell the user now, and in the report."""
        self.notes.append(text)
        self.note(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    @property
    def kv_format(self) -> KvFormat:
        """Of the cache that the original is served with."""
        return memory.kv_format(self.model.formats.values(), own=self.model.kv_formats)

    @property
    def kv_formats(self) -> tuple[KvFormat, KvFormat]:
        """Of the caches of the model that was given, and of the candidates."""
        given = memory.kv_format(self.given.formats.values(), own=self.given.kv_formats)
        own = self.cache if self.cache != "auto" or not self.model.kv_formats else self.model.kv_formats
        return given, own


def work_folder(output: Path) -> Path:
    return output.with_name(output.name + ".work")


def prepare(settings: Settings, report: Report, note: Note, clock: Clock | None = None) -> Job:
    """Everything that can be wrong with the input is found here, before anything takes long."""
    budget = (
        budgets.UNBOUNDED
        if settings.target and not settings.budget
        else budgets.parse_all(settings.budget or DEFAULT_BUDGET)
    )
    if settings.minutes is not None and not settings.minutes > 0:
        raise InputError(f"minutes is {settings.minutes:g}, must not be less than 0")
    settings = replace(settings, output=checked(settings.output))
    model = checkpoint.open(settings.model)
    model = model.at_context(min(model.graph.context, DEFAULT_CONTEXT))  # as it is served: rope may depend on it
    context, notes = model.graph.context, []  # type: ignore[var-annotated]
    aim = objectives.make(
        settings.objective,
        settings.batch,
        settings.lengths,
        settings.trace,
        settings.target,
        settings.memory_cap,
        context,
        notes.append,
    )
    eos = model.eos_token_ids
    files_of_tasks = [b.file for b in budget.tasks if b.file]
    asked = {f: tasks.load(f, model.tokenizer, eos, context) for f in files_of_tasks}
    samples.check(asked, budget)
    chosen = texts.choose(
        model.tokenizer, model.graph.context, settings.calibration, settings.eval, settings.model == "demo"
    )
    here = machine.describe()
    beside = peers.read(settings.peers) if settings.peers else None
    packed = check_room(model, chosen, settings.output, here)
    original = model.weights(report)
    build = native_build()
    key = [VERSION, files.fingerprint(model.path), model.graph.context, here.instruction_set, build]
    job = Job(
        settings,
        budget,
        aim,
        model,
        model.graph,
        original,
        chosen,
        asked,
        here,
        key,
        [here.cpu, here.instruction_set, build],
        packed,
        report,
        note,
        settings.threads or here.cores,
        clock or Clock(settings.minutes),
    )
    job.peers = beside
    if beside and beside["parameters"] != model.graph.parameters():
        job.say(
            f"{settings.peers} is of a model of {beside['parameters']:,} parameters, this one has "
            f"{model.graph.parameters():,}: its points are shown all the same"
        )
    for text in (*notes, *chosen.notes):
        job.say(text)
    return job


def checked(output: Path) -> Path:
    """The output as an absolute path with a name; the work folder lies beside it, and it is renamed into place."""
    output = Path(os.path.abspath(output))
    if not output.name or output.resolve() == Path.cwd():
        where = "the current directory" if output.name else "the root directory"
        raise OutputError(f"{output} is {where}, which cannot be replaced", "name a new directory")
    checkpoint.check_output(output)
    return output


def calibration_tokens(graph: Graph) -> int:
    parameters = graph.parameters()
    return 16384 if parameters < 5e7 else 8192 if parameters < 5e8 else 4096


def check_room(model: Model, chosen: Texts, output: Path, here: Machine) -> int:
    """Raises where memory or disk will not do; returns how many bytes of packed matrices may be kept.

    Memory: the model, the contenders beside it (at most a byte a parameter) with a cache and buffers each, a matrix in
    the making, the calibration's hidden states (before a block, after it, and while they are put together), and what
    the packer keeps.
    """
    graph = model.graph
    parameters = graph.parameters()
    largest = max(s.shape[0] * s.shape[1] for s in graph.matrices())
    one = perplexity.predict([(graph, model.formats)], [*chosen.search, *chosen.final])
    hidden = 3 * 4 * calibration_tokens(graph) * graph.hidden
    needed = one.weights + CONTENDERS * parameters + (1 + CONTENDERS) * (one.kv_cache + one.buffers)
    needed += 4 * 6 * largest + hidden + (256 << 20)
    available, packed = here.memory_available, min(LEAST_PACKED, 4 * parameters)
    if available is not None:
        packed = max(packed, min(available // 4, available - needed))
    needed += min(LEAST_PACKED, 4 * parameters)
    if available is not None and needed > available:
        raise MemoryLimitError(
            f"accelerating this model takes about {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are available",
            "use a smaller model or a larger machine",
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} cannot be written to", "choose another output")
    free, wanted = shutil.disk_usage(parent).free, parameters * 5 // 8 + (16 << 20)
    if free < wanted:
        raise OutputError(
            f"the artifact may take {wanted / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB left", "free some space"
        )
    return packed
