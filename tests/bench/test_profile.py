"""Profiles: figures from recordings written by hand, and of a program that runs."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends.native import Recording
from hasten.bench import profile as subject_module
from hasten.bench.latency import Loaded
from hasten.bench.machine import Limits
from hasten.bench.profile import DRAW, ROPE, Clocked, Loop, Phase, Sheet, Step, boundaries, profile, record, waited
from hasten.bench.regions import Need, Region, Span
from hasten.errors import InputError
from hasten.graph.graph import Node
from hasten.graph.ops import Add

LIMITS = Limits(memory_read_gbs=1.0, int8_gmacs=1.0, bf16_gmacs=0.5, threads=2)  # 1 byte or product a nanosecond


def region(kind: str, block: int | None, shape: str = "", format: str = "") -> Region:
    return Region(kind, block, shape, format, False, Node(Add(), kind, (), (f"{kind}{block}",)))


# --- two steps of two threads, three plan steps, by hand: (entered, rope, a, b, a)

MARKS = [
    [[110, 111, 120, 150, 190], [112, 113, 121, 149, 192]],  # thread 1 is first out of the second plan step
    [[320, 320, 340, 380, 400], [0, 0, 0, 0, 0]],  # thread 1 slept
]
WAITS = [
    [
        [[115, 120], [180, 190]],
        [[140, 149], [0, 0]],
    ],  # thread 0 waits in the first and the third, thread 1 in the second
    [[[0, 0], [0, 0]], [[0, 0], [0, 0]]],
]
RECORDING = Recording(np.array(MARKS, np.int64), np.array(WAITS, np.int64))
STEPS = (
    Step(begin=100, computed=200, drawn=230, span=Span(((0, 0),), 1)),
    Step(begin=230, computed=410, drawn=440, span=Span(((1, 1),), 1)),
)
REGIONS = [region("a", 0, "[1 -> 2]", "f32"), region("b", 0), region("a", 1, "[1 -> 3]", "f32")]
NEEDS = {"a0": Need(bytes=5), "b0": Need(bytes=2, int_macs=10, float_macs=4), "a1": Need(bytes=9, int_macs=12)}


class NeedsByHand:
    def need(self, node: Node, span: Span) -> Need:
        return NEEDS[node.outputs[0]]


def sheet(steps: tuple[Step, ...], recording: Recording) -> Sheet:
    program: Any = SimpleNamespace(threads=2, graph=SimpleNamespace(vocabulary=3))
    counter: Any = NeedsByHand()
    return Sheet("decode", program, REGIONS, counter, [Loop(steps, recording)], LIMITS)


def test_a_part_is_over_when_the_first_thread_leaves_it() -> None:
    assert boundaries(RECORDING).tolist() == [[110, 111, 120, 149, 190], [320, 320, 340, 380, 400]]


def test_waits_belong_to_the_part_that_their_thread_is_in() -> None:
    assert waited(RECORDING).tolist() == [[0, 5, 9, 10], [0, 0, 0, 0]]


def nanoseconds(value: float) -> float:
    return value * 1e9


def test_figures_of_the_quicker_half() -> None:
    phase = sheet(STEPS, RECORDING).phase(together=1)
    assert (phase.passes, phase.counted) == (2, 1)
    assert nanoseconds(phase.seconds) == pytest.approx(130)
    assert nanoseconds(phase.median_seconds) == pytest.approx((130 + 210) / 2)
    times = {row.label: nanoseconds(row.seconds) for row in phase.each}
    assert times == {
        ROPE: pytest.approx(1),
        "block 0: a [1 -> 2] f32": pytest.approx(9),
        "block 0: b": pytest.approx(29),
        "block 1: a [1 -> 3] f32": pytest.approx(41),
        DRAW: pytest.approx(30),
    }
    assert nanoseconds(phase.unaccounted_seconds) == pytest.approx(130 - 1 - 9 - 29 - 41 - 30)


def test_a_kind_is_the_sum_of_its_regions() -> None:
    rows = {row.kind: row for row in sheet(STEPS, RECORDING).phase(together=1).rows}
    assert list(rows) == [ROPE, "a", "b", DRAW]
    a, b = rows["a"], rows["b"]
    assert (a.regions, a.block, a.shape, a.format) == (2, None, "2 shapes", "f32")
    assert (b.regions, b.block, b.label) == (1, 0, "block 0: b")
    assert nanoseconds(a.seconds) == pytest.approx(50)
    assert a.share_of_time == pytest.approx(50 / 130)
    assert a.waiting == pytest.approx((5 + 10) / (2 * 50))
    assert (a.bytes, a.int_macs, a.float_macs) == (14, 12, 0)
    assert nanoseconds(a.limit_seconds) == pytest.approx(5 + 12)  # each by what binds it
    assert (a.bound, b.bound, rows[ROPE].bound, rows[DRAW].bound) == ("bytes", "operations", "", "bytes")
    assert nanoseconds(b.limit_seconds) == pytest.approx(10 + 4 / 0.5)
    assert b.share_of_limit == pytest.approx(18 / 29)
    assert rows[DRAW].bytes == 3 * 4  # a row of float32 logits


def test_steps_of_one_pass_are_added() -> None:
    phase = sheet(STEPS, RECORDING).phase(together=2)
    assert (phase.passes, phase.counted) == (1, 1)
    assert nanoseconds(phase.seconds) == pytest.approx(130 + 210)
    (b,) = (row for row in phase.rows if row.kind == "b")
    assert nanoseconds(b.seconds) == pytest.approx(29 + 40)
    assert (b.bytes, b.int_macs) == (4, 20)


# --- a program that runs


def loaded(**sizes: int) -> tuple[Loaded, dict[str, Any]]:
    graph = tiny_graph()
    packer = formats.get("int8-g32")
    weights = {
        name: packer.pack(array.astype(np.float32)) if array.ndim == 2 else array.astype(np.float32)
        for name, array in random_arrays(graph).items()
    }
    return Loaded(graph, weights, **{"prompt": 20, "new": 6, "batch": 2, "threads": 2, **sizes}), weights


def accounted(phase: Phase) -> float:
    return sum(row.seconds for row in phase.rows) + phase.unaccounted_seconds


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_and_the_unaccounted_make_the_wall_time(threads: int) -> None:
    subject, weights = loaded(threads=threads)
    program = subject.program
    found = profile(subject, weights, 2, rounds=3, threads=threads)
    assert subject.program is program
    assert len(program.recording().marks) == 0  # it is off again
    for phase, passes in ((found.prefill, 3), (found.decode, 3 * 6)):
        assert (phase.passes, phase.counted) == (passes, -(-passes // 2))
        assert accounted(phase) == pytest.approx(phase.seconds)
        assert sum(row.seconds for row in phase.each) == pytest.approx(sum(row.seconds for row in phase.rows))
        assert 0 < phase.unaccounted_seconds < phase.seconds
        assert all(row.seconds >= 0 and 0 <= row.waiting <= 1 for row in phase.each)
        assert len(phase.each) == len(program.plan) + 2
        assert sum(row.regions for row in phase.rows) == len(program.plan)


def test_a_prefill_of_several_steps_is_one_pass() -> None:
    subject, weights = loaded(prompt=40, new=1, batch=16)
    found = profile(subject, weights, 16, rounds=2).prefill
    assert (found.passes, found.counted) == (2, 1)
    macs = {row.kind: row.int_macs for row in found.rows}
    assert macs["down linear + residual"] == 2 * 640 * 40 * 24  # 640 tokens, more than a step takes; two blocks
    assert macs["head linear + norm"] == 16 * 50 * 24


def test_walls_follow_each_other_without_a_gap_and_fill_the_loop() -> None:
    subject, _ = loaded()
    subject.prefill(2)
    before = time.monotonic_ns()
    loop = record(subject, 6, lambda: subject.decode(2))
    after = time.monotonic_ns()
    assert len(loop.steps) == len(loop.recording.marks) == 6
    assert before <= loop.steps[0].begin
    assert loop.steps[-1].drawn <= after
    for step, following in zip(loop.steps, loop.steps[1:], strict=False):
        assert following.begin == step.drawn
    for step, marks in zip(loop.steps, boundaries(loop.recording), strict=True):
        assert step.begin <= marks[0] <= marks[-1] <= step.computed <= step.drawn
    assert [step.span for step in loop.steps] == [Span(((p, p),) * 2, rows=2) for p in range(20, 26)]


def test_the_profiled_program_draws_the_same_tokens() -> None:
    plain, _ = loaded()
    recorded, _ = loaded()
    drawn = []
    for subject in (plain, recorded):
        run = (
            subject.prefill if subject is plain else lambda batch: record(recorded, 2, lambda: recorded.prefill(batch))
        )
        run(2)
        drawn.append(subject._last.copy())
    np.testing.assert_array_equal(*drawn)


def test_clocked_notes_the_time_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10, 20, 25, 40])
    monkeypatch.setattr(subject_module, "_native", SimpleNamespace(clock_ns=lambda: next(ticks)))
    outputs = SimpleNamespace(sample=lambda sampling: f"drawn as {sampling}")
    program: Any = SimpleNamespace(step=lambda batch: outputs)
    batch: Any = SimpleNamespace(positions=np.array([3]), starts=np.array([0, 1]), rows=[0])
    clocked, how = Clocked(program), "told"
    clocked.begin()
    assert clocked.step(batch).sample(how) == "drawn as told"  # type: ignore[arg-type,comparison-overlap]
    clocked.step(batch)
    span = Span(((3, 3),), 1)
    assert clocked.steps == [Step(10, 20, 25, span), Step(25, 40, 40, span)]


def test_no_rounds_are_refused() -> None:
    subject, weights = loaded()
    with pytest.raises(InputError, match="rounds is 0, must be at least 1"):
        profile(subject, weights, 1, rounds=0)
