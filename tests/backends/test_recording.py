"""Recordings of a program's steps: complete, in order, inside the step's own time; no bit of a result changes."""

import time

import numpy as np
import pytest
from programs import TOKENS_OF, batch, limits, pack
from support import random_arrays, tiny_graph

from hasten import _native
from hasten.backends import native
from hasten.errors import BackendError


def compiled(threads=2, **options):
    graph = tiny_graph(**options)
    return native.compile(graph, pack(graph, random_arrays(graph), "int8-g32"), limits(threads=threads))


def waits_of(recording, run, thread):
    pairs = recording.waits[run, thread]
    return pairs[pairs[:, 0] > 0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_times_are_in_order_and_inside_the_step(threads):
    program = compiled(threads)
    program.record(4)
    spans = []
    for _ in range(4):
        before = time.monotonic_ns()  # on Linux the clock of std::chrono::steady_clock
        program.step(batch(TOKENS_OF))
        spans.append((before, time.monotonic_ns()))
    found = program.recording()
    assert found.marks.shape == (4, threads, len(program.plan) + 2)
    for run, (before, after) in enumerate(spans):
        assert found.marks[run, 0].all()  # the caller is always there
        for marks in found.marks[run]:
            assert marks.all() or not marks.any()
            assert (np.diff(marks) >= 0).all()
            assert not marks.any() or before <= marks[0] <= marks[-1] <= after


@pytest.mark.parametrize("threads", [2, 3])
def test_waits_are_in_order_and_inside_their_thread(threads):
    if _native.granted_threads() < 2:
        pytest.skip("with one core, a thread is rather held up than kept waiting")
    program, seen, deadline = compiled(threads), 0, time.monotonic() + 60
    while seen == 0 and time.monotonic() < deadline:  # a busy machine may hold the others up through many steps
        program.record(50)
        for _ in range(50):
            program.step(batch(TOKENS_OF))
        found = program.recording()
        for run in range(50):
            for thread in range(threads):
                pairs = waits_of(found, run, thread).reshape(-1)
                marks = found.marks[run, thread]
                assert (np.diff(pairs) >= 0).all()
                assert len(pairs) == 0 or marks[0] <= pairs[0] <= pairs[-1] <= marks[-1]
                seen += len(pairs)
    assert seen > 0


@pytest.mark.parametrize("wanted", [True, False])
def test_a_plan_step_has_the_time_that_it_took(wanted):
    # The vocabulary makes the head, which comes last, most of a step, or nothing where no rows are wanted.
    program = compiled(threads=1, vocabulary=20000, blocks=1)
    program.record(9)
    for _ in range(9):
        program.step(batch(TOKENS_OF, rows=None if wanted else []))
    times = np.median(np.diff(program.recording().marks[:, 0]), axis=0)
    assert len(times) == len(program.plan) + 1  # rope tables come before
    share = times[-1] / times.sum()
    assert share > 0.8 if wanted else share < 0.05


def test_one_thread_never_waits():
    program = compiled(threads=1)
    program.record(1)
    program.step(batch(TOKENS_OF))
    assert not program.recording().waits.any()


def test_only_what_was_asked_for_is_recorded():
    program = compiled()
    program.step(batch(TOKENS_OF))
    assert len(program.recording().marks) == 0
    program.record(2)
    for expected in (1, 2, 2):
        program.step(batch(TOKENS_OF))
        assert len(program.recording().marks) == expected
    program.record(3)
    assert len(program.recording().marks) == 0
    program.record(0)
    program.step(batch(TOKENS_OF))
    assert len(program.recording().marks) == 0
    assert len(program.recording().waits) == 0


def test_a_number_that_cannot_be_is_refused():
    program = compiled()
    with pytest.raises(BackendError, match="a recording of -1 steps"):
        program.record(-1)


@pytest.mark.parametrize("threads", [1, 2])
def test_recording_changes_no_bit(threads):
    plain, recorded = compiled(threads), compiled(threads)
    recorded.record(8)
    for start in range(0, 40, 10):
        part = batch(TOKENS_OF[start : start + 10], start)
        np.testing.assert_array_equal(plain.step(part).logits(), recorded.step(part).logits())


@pytest.mark.parametrize("options", [{}, {"head_norms": True}, {"post_norms": True}, {"tied": False}], ids=str)
def test_every_plan_step_has_its_node(options):
    program = compiled(**options)
    assert program.plan == program.graph.nodes
