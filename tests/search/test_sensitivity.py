from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import random_arrays, tiny_graph

from hasten import formats
from hasten.backends import feed, native, reference
from hasten.compress import calibrate
from hasten.compress.recipe import KEEP, Choice
from hasten.compress.run import Packer
from hasten.search import sensitivity
from hasten.search.candidates import Tensor, tensors
from hasten.search.sensitivity import Plan
from hasten.search.trials import Trials

F32 = formats.get("f32")


def silent(stage: str, done: int, total: int) -> None:
    pass


def model(**shape):
    graph = tiny_graph(**shape)
    arrays = {n: np.asarray(a, np.float32) for n, a in random_arrays(graph).items()}
    weights = {n: F32.pack(a) if a.ndim == 2 else a for n, a in arrays.items()}
    rng = np.random.default_rng(1)
    windows = [rng.integers(0, graph.vocabulary, n).astype(np.int32) for n in (50, 33)]
    return graph, arrays, weights, windows


def gathered(graph, weights, windows):
    """With what every method may ask for."""
    names = [spec.name for spec in graph.matrices()]
    return calibrate.calibrate(graph, weights, windows, kv_format="bf16", hessians=names)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def textbook_divergence(graph, arrays, changed, windows) -> float:
    total, count = 0.0, 0
    for window in windows:
        p, q = (
            log_softmax(reference.forward(graph, {n: a.astype(np.float64) for n, a in own.items()}, window))
            for own in (arrays, {**arrays, **changed})
        )
        total += float((np.exp(p) * (p - q)).sum())
        count += len(window)
    return total / count


@pytest.mark.parametrize("tied", [True, False])
def test_divergence_of_one_changed_matrix(tied: bool) -> None:
    """From hidden states kept at the block's input, against both whole models in float64."""
    graph, arrays, weights, windows = model(tied=tied)
    limits = feed.window_limits(64, 32, kv_format="f32")
    final = calibrate.calibrate(graph, weights, windows, kv_format="bf16").final
    depth = len(graph.blocks)
    head = graph.tail(depth)
    program = native.compile(head, {n: weights[n] for n in head.weights}, limits)
    rng = np.random.default_rng(2)
    hidden = None
    for block in range(-1, depth + 1):
        section = graph if block < 0 else graph.tail(block)
        if block >= 0:
            hidden = sensitivity._advance(graph, weights, windows, hidden, block, limits, final)
        for tensor in (t for t in tensors(graph, weights) if t.block == block):
            noise = rng.normal(0, 0.3 * arrays[tensor.name].std(), tensor.shape).astype(np.float32)
            changed = arrays[tensor.name] + noise
            own = {**{n: weights[n] for n in section.weights}, tensor.name: F32.pack(changed)}
            (found,) = sensitivity.divergences(section, [own], windows, hidden, program, final, limits)
            expected = textbook_divergence(graph, arrays, {tensor.name: changed}, windows)
            assert found == pytest.approx(expected, rel=0.03), tensor.name


def test_where_tensors_stand() -> None:
    graph, _, weights, _ = model(tied=True)
    found = {t.name: t for t in tensors(graph, weights)}
    assert (found["embed.weight"].block, found["embed.weight"].linears, found["embed.weight"].embeds) == (-1, 1, 1)
    assert found["blocks.1.q.weight"].block == 1
    assert found["blocks.1.q.weight"].role == "blocks.*.q.weight"
    graph, _, weights, _ = model(tied=False)
    found = {t.name: t for t in tensors(graph, weights)}
    assert (found["embed.weight"].linears, found["head.weight"].linears) == (0, 1)
    assert (found["head.weight"].block, found["head.weight"].at_rows) == (2, True)
    assert not found["blocks.0.q.weight"].at_rows
    assert found["embed.weight"].choices[0] == KEEP
    assert Choice("int4-g64", "clip") in found["embed.weight"].choices


def test_measures_once_and_estimates_the_rest(tmp_path: Path) -> None:
    graph, arrays, weights, windows = model()
    statistics = gathered(graph, weights, windows)
    packer = Packer(weights, arrays.__getitem__, statistics.inputs)
    found = tensors(graph, weights)
    plan = Plan(("int4", "int8"), 64)
    limits = feed.window_limits(64, 32)
    with Trials(tmp_path / "w", keep=True) as trials:
        errors = sensitivity.errors(found, packer, trials, "k", silent)

        def measure():
            return sensitivity.measure(
                graph, weights, found, windows, statistics.final, packer, plan, trials, "k", silent, limits
            )

        first = measure()
        made = trials.made
        assert len(first) == 2 * len(found)
        assert measure() == first
        assert trials.made == made
    losses = sensitivity.estimate(found, first, errors)
    for tensor in found:
        assert losses[tensor.name, KEEP] == 0.0
        by = {c.format: losses[tensor.name, c] for c in tensor.choices}
        assert all(np.isfinite(list(by.values())))
        assert by["int8-g64"] < by["int4-g64"]
        four = {c.format: c for c in tensor.choices}
        ratio = errors[tensor.name, four["int4-g128"]] / errors[tensor.name, four["int4-g64"]]
        assert by["int4-g128"] == pytest.approx(by["int4-g64"] * ratio)


def test_a_format_that_cannot_hold_a_matrix_is_no_candidate(tmp_path: Path) -> None:
    graph, arrays, weights, windows = model()
    statistics = gathered(graph, weights, windows)
    name = "blocks.0.down.weight"
    arrays[name] = arrays[name] * np.float32(1e9)  # int4's scales would pass f16's 65504
    weights[name] = F32.pack(arrays[name])
    packer = Packer(weights, arrays.__getitem__, statistics.inputs)
    found = tensors(graph, weights)
    with Trials(tmp_path / "work") as trials:
        errors = sensitivity.errors(found, packer, trials, ["model"], silent)
    left = {t.name: t.choices for t in sensitivity.holdable(found, errors)}
    assert {c.format for c in left[name] if not c.is_original} == {"bf16"}
    assert all(len(left[t.name]) == len(t.choices) for t in found if t.name != name)


def test_a_block_left_out_takes_its_neighbours_measure() -> None:
    def tensor(block: int) -> Tensor:
        return Tensor(f"b.{block}.up", (8, 8), "f32", block, 1, 0, False, (KEEP, Choice("int4-g64", "clip")))

    choice = Choice("int4-g64", "clip")
    three = [tensor(0), tensor(1), tensor(2)]
    errors = {("b.0.up", choice): 1.0, ("b.1.up", choice): 3.0, ("b.2.up", choice): 5.0}
    losses = sensitivity.estimate(three, {("b.0.up", choice): 0.01}, errors)
    assert losses["b.1.up", choice] == pytest.approx(0.03)
    assert losses["b.2.up", choice] == pytest.approx(0.05)


def test_plan_fits_the_time() -> None:
    graph, _, weights, _ = model()
    found = tensors(graph, weights)
    generous = sensitivity.plan(graph, found, 1e-6, 600, 10_000)
    hasty = sensitivity.plan(graph, found, 1.0, 60, 10_000)
    assert (generous.kinds, generous.tokens, generous.stride) == (("int4", "int8", "codebook4"), 1024, 1)
    assert (len(hasty.kinds), hasty.tokens) == (1, 256)
    assert hasty.stride > 1
