"""Where the time of a step goes: each fused region of a running program beside its own limit, measured in the same run.

What is profiled is what `latency` times, the compiled program that serves: every thread notes when each plan step is
over for it, and when it waits. A region lasts from when the first thread is done with the one before until the first
thread is done with it; nobody is done with a region whose work is not. So regions follow each other without a gap, and
what a step takes beyond them (Python, checks, waking threads) is known exactly: it is shown as unaccounted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.backends.batch import Batch, Sampled, SamplingBatch
from hasten.backends.native import NativeOutputs, NativeProgram, Recording
from hasten.bench import machine
from hasten.bench.latency import Loaded, Progress
from hasten.bench.regions import FLOAT, Counter, Need, Region, Span, describe
from hasten.engine.llm import STEP_TOKENS
from hasten.errors import InputError

ROPE, DRAW = "rope tables", "draw tokens"  # the parts of a step that are no plan step
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One step of the program, in nanoseconds of `_native.clock_ns()`."""

    begin: int
    """The step before was over; what Python did since then counts here."""
    computed: int
    drawn: int
    """Its tokens were drawn; as `computed` where none were."""
    span: Span


@dataclass(frozen=True)
class Loop:
    """The steps of one prefill, or of one decoding: recording.marks has a run for each."""

    steps: tuple[Step, ...]
    recording: Recording


@dataclass(frozen=True)
class Row:
    """One region, or all of one kind together; figures are means over the passes that count."""

    label: str
    kind: str
    block: int | None
    shape: str
    format: str
    regions: int
    """Plan steps in it; 0 for what is no plan step."""
    seconds: float
    share_of_time: float
    waiting: float
    """Share of its threads' time that they waited for each other."""
    bytes: float
    int_macs: float
    float_macs: float
    limit_seconds: float
    """The least time that memory or arithmetic allows, whichever is longer, added up over its regions."""
    share_of_limit: float
    """limit_seconds / seconds. Past 1 where bytes come from a cache, whose speed is not the memory's."""
    bound: str
    """What that limit is: "bytes", "operations", or "" where nothing has to be done."""


@dataclass(frozen=True)
class Phase:
    """All prefills, or all decoding steps. Rows and `unaccounted_seconds` add up to `seconds`."""

    name: str
    passes: int
    """Prefills, or decoding steps, that were timed."""
    counted: int
    """The quicker half of them, which the figures are means of: other programs only ever disturb."""
    seconds: float
    median_seconds: float
    """Of all passes."""
    unaccounted_seconds: float
    limit_seconds: float
    share_of_limit: float
    rows: tuple[Row, ...]
    """By kind, in the order of the plan."""
    each: tuple[Row, ...]
    """One for each plan step."""


@dataclass(frozen=True)
class Profile:
    prefill: Phase
    decode: Phase
    limits: machine.Limits
    regions: tuple[Region, ...]
    last: tuple[Loop, Loop]
    """The last prefill and its decoding, for a trace."""


def profile(
    subject: Loaded, weights: Any, batch: int, *, rounds: int = 5, threads: int = 0, progress: Progress | None = None
) -> Profile:
    """Prefill and decode `batch` sequences `rounds` times over. `weights` are those of the subject's graph.

    Raises InputError where `rounds` is not positive.
    """
    if rounds < 1:
        raise InputError(f"rounds is {rounds}, must be at least 1")
    report = progress or (lambda stage, done, total: None)
    program = subject.program
    subject.warm_up(batch)
    limits = machine.limits(threads=threads)
    prefills, decodings = [], []
    for done in range(rounds):
        report("profiling", done, rounds)
        prefills.append(record(subject, -(-batch * subject.prompt // STEP_TOKENS), lambda: subject.prefill(batch)))
        decodings.append(record(subject, subject.new, lambda: subject.decode(batch)))
    report("profiling", rounds, rounds)
    limits = limits.best(machine.limits(threads=threads))
    regions = describe(program.graph, program.plan, weights)
    counter = Counter(program.graph, weights, subject.work.kv_bytes)
    return Profile(
        prefill=Sheet("prefill", program, regions, counter, prefills, limits).phase(together=len(prefills[0].steps)),
        decode=Sheet("decode", program, regions, counter, decodings, limits).phase(together=1),
        limits=limits,
        regions=tuple(regions),
        last=(prefills[-1], decodings[-1]),
    )


def record(subject: Loaded, steps: int, loop: Callable[[], object]) -> Loop:
    """Run `loop`, of at most `steps` steps, and hand out what its program recorded."""
    program = subject.program
    clocked = Clocked(program)
    program.record(steps)
    subject.program = cast(NativeProgram, clocked)
    try:
        clocked.begin()
        loop()
        return Loop(tuple(clocked.steps), program.recording())
    finally:
        subject.program = program
        program.record(0)


class Clocked:
    """Stands before a program, and its outputs, and notes the time between their calls."""

    def __init__(self, program: NativeProgram) -> None:
        self.steps: list[Step] = []
        self._program = program
        self._outputs: NativeOutputs | None = None
        self._last = 0

    def begin(self) -> None:
        self._last = _native.clock_ns()

    def step(self, batch: Batch) -> Clocked:
        self._outputs = self._program.step(batch)
        now = _native.clock_ns()
        self.steps.append(Step(self._last, now, now, Span.of(batch)))
        self._last = now
        return self

    def sample(self, sampling: SamplingBatch) -> Sampled:
        assert self._outputs is not None
        drawn = self._outputs.sample(sampling)
        step, self._last = self.steps[-1], _native.clock_ns()
        self.steps[-1] = Step(step.begin, step.computed, self._last, step.span)
        return drawn


def boundaries(recording: Recording) -> npt.NDArray[np.int64]:
    """[runs, plan steps + 2] when the first thread entered, and when each part was over: never falling."""
    marks = recording.marks
    first: npt.NDArray[np.int64] = np.where(marks == 0, np.iinfo(np.int64).max, marks).min(axis=1)
    return first


def waited(recording: Recording) -> npt.NDArray[np.int64]:
    """[runs, plan steps + 1] nanoseconds that all threads together waited in each part."""
    runs, threads, marks = recording.marks.shape
    total = np.zeros((runs, marks - 1), np.int64)
    for run in range(runs):
        for thread in range(threads):
            begun, ended = recording.waits[run, thread].T
            begun, ended = begun[begun > 0], ended[begun > 0]
            part = np.searchsorted(recording.marks[run, thread], begun, side="right") - 1
            np.add.at(total[run], part, ended - begun)
    return total


class Sheet:
    """The figures of one phase: a line for each step of the program, a column for each part of a step."""

    def __init__(
        self,
        name: str,
        program: NativeProgram,
        regions: Sequence[Region],
        counter: Counter,
        loops: Sequence[Loop],
        limits: machine.Limits,
    ) -> None:
        self.name, self.regions, self.threads = name, regions, program.threads
        steps = [step for loop in loops for step in loop.steps]
        drawing = np.array([[step.drawn - step.computed] for step in steps])
        plan = np.concatenate([np.diff(boundaries(loop.recording), axis=1) for loop in loops])
        self.times: Floats = np.concatenate([plan, drawing], axis=1) / 1e9  # [steps, parts] rope, plan steps, drawing
        self.walls: Floats = np.array([step.drawn - step.begin for step in steps]) / 1e9  # [steps]
        waits = np.concatenate([waited(loop.recording) for loop in loops])
        self.waits: Floats = np.concatenate([waits, np.zeros_like(drawing)], axis=1) / 1e9
        needs = {step.span: self._needs(program, counter, step.span) for step in steps}
        table = [needs[step.span] for step in steps]
        self.needs: Floats = np.array([[(n.bytes, n.int_macs, n.float_macs) for n in row] for row in table], float)
        memory = np.array([[n.memory_seconds(limits) for n in row] for row in table])
        arithmetic = np.array([[n.arithmetic_seconds(limits) for n in row] for row in table])
        self.least: Floats = np.stack([memory, arithmetic, np.maximum(memory, arithmetic)], axis=2)

    def _needs(self, program: NativeProgram, counter: Counter, span: Span) -> list[Need]:
        drawing = Need(FLOAT * span.rows * program.graph.vocabulary)
        return [Need(), *(counter.need(region.node, span) for region in self.regions), drawing]

    def phase(self, together: int) -> Phase:
        """A pass is so many steps `together`; the quicker half of the passes counts."""

        def passes(values: Floats) -> Floats:
            added: Floats = values.reshape(-1, together, *values.shape[1:]).sum(axis=1)
            return added

        walls = passes(self.walls)
        quick = np.argsort(walls, kind="stable")[: -(-len(walls) // 2)]
        figures = [passes(values)[quick].mean(axis=0) for values in (self.times, self.waits, self.needs, self.least)]
        seconds = float(walls[quick].mean())
        columns = range(len(self.regions) + 2)
        by_kind: dict[str, list[int]] = {}
        for column in columns:
            by_kind.setdefault(self._words(column)[1], []).append(column)
        limit = float(figures[3][:, 2].sum())
        return Phase(
            name=self.name,
            passes=len(walls),
            counted=len(quick),
            seconds=seconds,
            median_seconds=float(np.median(walls)),
            unaccounted_seconds=seconds - float(figures[0].sum()),
            limit_seconds=limit,
            share_of_limit=limit / seconds,
            rows=tuple(self._row(members, figures, seconds) for members in by_kind.values()),
            each=tuple(self._row([column], figures, seconds) for column in columns),
        )

    def _words(self, column: int) -> tuple[str, str, int | None, str, str]:
        """(label, kind, block, shape, format) of a part."""
        if 1 <= column <= len(self.regions):
            region = self.regions[column - 1]
            return region.label, region.kind, region.block, region.shape, region.format
        name = DRAW if column else ROPE
        return name, name, None, "", ""

    def _row(self, members: list[int], figures: list[Floats], wall: float) -> Row:
        label, kind, block, shape, format = self._words(members[0])
        if len(members) > 1:
            label, block = kind, None
            shapes, formats = ({self._words(m)[place] for m in members} for place in (3, 4))
            shape = shape if len(shapes) == 1 else f"{len(shapes)} shapes"
            format = format if len(formats) == 1 else f"{len(formats)} formats"
        seconds, waits = (float(values[members].sum()) for values in figures[:2])
        read, integer, floating = (float(x) for x in figures[2][members].sum(axis=0))
        memory, arithmetic, least = (float(x) for x in figures[3][members].sum(axis=0))
        return Row(
            label=label,
            kind=kind,
            block=block,
            shape=shape,
            format=format,
            regions=sum(1 <= m <= len(self.regions) for m in members),
            seconds=seconds,
            share_of_time=seconds / wall,
            waiting=waits / (seconds * self.threads) if seconds else 0.0,
            bytes=read,
            int_macs=integer,
            float_macs=floating,
            limit_seconds=least,
            share_of_limit=least / seconds if seconds else 0.0,
            bound="" if least == 0 else "bytes" if memory >= arithmetic else "operations",
        )
