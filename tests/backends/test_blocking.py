"""How work is cut is measured by the steps that serve, remembered, and never changes a bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import blocking, feed, native
from hasten.backends.batch import Float32, Limits
from hasten.graph.graph import Graph, GraphBuilder
from hasten.graph.ops import Input, Linear

KiB = 1024
WAYS = [(6, 128, 128 * KiB), (2, 128, 128 * KiB), (16, 128, 128 * KiB), (6, 64, 128 * KiB), (6, 256, 512 * KiB)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def program(tune: bool = True, tokens: int = 60) -> native.NativeProgram:
    """A small model; for more tokens than its context, a chain of two matrices from given hidden states."""
    graph = tiny_graph(hidden=64, feed_forward=192, vocabulary=300) if tokens <= 60 else chain(tokens)
    int4 = formats.get("int4-g32")
    weights = {
        n: int4.pack(np.asarray(a, np.float32)) if a.ndim == 2 else np.asarray(a, np.float32)
        for n, a in random_arrays(graph).items()
    }
    limits: Limits = feed.window_limits(graph.context, tokens, threads=2)
    return native.compile(graph, weights, limits, tune=tune)


def chain(tokens: int) -> Graph:
    builder = GraphBuilder(context=tokens, vocabulary=300, hidden=64)
    builder.add(Input(64), "x")
    builder.add(Linear(), "wide", "x", weights=(builder.weight("up", 1000, 64),))
    builder.add(Linear(), "out", "wide", weights=(builder.weight("down", 300, 1000),))
    return builder.finish("out")


def run(made: native.NativeProgram, tokens: int) -> Float32:
    window = np.random.default_rng(5).integers(0, 300, tokens).astype(np.int32)
    ((_, _, batch),) = feed.windows([window], made.limits)
    if tokens > 60:
        batch.hidden = np.random.default_rng(6).normal(size=(tokens, 64)).astype(np.float32)
    return made.step(batch).logits()


def test_steps_choose_and_the_next_process_remembers(cache: Path) -> None:
    made = program()
    for _ in range(60):
        run(made, 1)
    chosen = made._native.blockings()
    assert chosen
    assert {regime for _, regime, *_ in chosen} == {0}
    del made
    assert program()._native.blockings() == chosen
    assert program(tune=False)._native.blockings() == []
    for _ in range(60):  # a program that was not asked to never measures
        run(plain := program(tune=False), 1)
    assert plain._native.blockings() == []


@pytest.mark.parametrize("tokens", [1, 3, 20, 60, 300])
def test_no_way_of_cutting_changes_a_bit(cache: Path, tokens: int) -> None:
    tuned = program(tokens=max(60, tokens))
    for _ in range(60):
        run(tuned, tokens)
    signatures = {signature for signature, *_ in tuned._native.blockings()}
    assert signatures
    expected = run(program(tune=False, tokens=max(60, tokens)), tokens)
    taken = 0
    for way in WAYS:
        other = program(tune=False, tokens=max(60, tokens))
        for signature in signatures:
            for regime in range(5):
                other._native.remember((signature, regime, *way))
        taken += len(other._native.blockings()) > 0
        np.testing.assert_array_equal(run(other, tokens).view(np.uint32), expected.view(np.uint32))
    assert taken == len(WAYS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"a": 1}',
        "[[1, 2]]",
        '[["x", 0, -1, 2, 3]]',
        '[["x", 99, 6, 128, 131072]]',
        '[["x", 1099511627775, 6, 128, 131072]]',
        '[["\\ud800", 0, 6, 128, 131072]]',
        '[["x", 0, 1e9, 1, 1]]',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_strange_file_is_no_file(cache: Path, text: str) -> None:
    made = program()
    path = blocking.file(made.isa, made.threads)
    assert path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    fresh = program()
    assert fresh._native.blockings() == []
    for _ in range(60):
        run(fresh, 1)
    del fresh
    assert json.loads(path.read_text())


def test_a_folder_that_cannot_be_written_is_no_fault(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    made = program()
    for _ in range(60):
        run(made, 1)
    assert made._native.blockings()
