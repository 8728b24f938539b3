"""Costs scaled by whole models: a world whose times are known is found again, and what was measured is kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from support import tiny_graph

from hasten.compress.recipe import KEEP, Choice
from hasten.graph.graph import Graph
from hasten.search import whole
from hasten.search.candidates import Tensor
from hasten.search.clock import Clock
from hasten.search.cost import Whole
from hasten.search.objective import Objective
from hasten.search.refine import Space
from hasten.search.trials import Trials

LARGE, SMALL = Choice("int8-g64", "clip"), Choice("int4-g64", "gptq")
ALONE = [[4.0, 2.0, 1.0], [8.0, 4.0, 2.0], [4.0, 2.0]]


def tensors() -> list[Tensor]:
    """The last one has no choice of four bits."""
    return [
        Tensor(f"b.{i}.w", (64, 64), "bf16", i, 1, 0, False, (KEEP, LARGE, SMALL)[: len(row)])
        for i, row in enumerate(ALONE)
    ]


def truth(scale: dict[str, float], rest: float) -> tuple[float, dict[str, float]]:
    """Seconds of the original, and shares of it in each format, of a world where matrices take `scale` times more."""
    names = ["bf16", "int8-g64", "int4-g64"]

    def total(column: int) -> float:
        return rest + sum(row[c] * scale[names[c]] for row in ALONE for c in [column if column < len(row) else 0])

    return total(0), {name: total(i) / total(0) for i, name in enumerate(names) if i}


@pytest.mark.parametrize(
    ("scale", "rest"), [((1.0, 1.0, 1.0), 4.0), ((1.3, 0.8, 1.5), 3.0), ((0.9, 0.9, 2.0), 0.5), ((2.0, 1.0, 0.7), 20.0)]
)
def test_sums_come_out_as_measured(scale: tuple[float, float, float], rest: float) -> None:
    names = dict(zip(("bf16", "int8-g64", "int4-g64"), scale, strict=True))
    seconds, shares = truth(names, rest)
    found = whole.fit(tensors(), ALONE, seconds, shares)
    costs = found.scaled(tensors(), ALONE)
    before = sum(row[0] for row in costs)
    for column, name in ((1, "int8-g64"), (2, "int4-g64")):
        after = sum(row[column if column < len(row) else 0] for row in costs)
        assert 1 - (before - after) / seconds == pytest.approx(shares[name])
    mixed = costs[0][1] + costs[1][2] + costs[2][0]
    real = rest + ALONE[0][1] * scale[1] + ALONE[1][2] * scale[2] + ALONE[2][0] * scale[0]
    assert 1 - (before - mixed) / seconds == pytest.approx(real / seconds, rel=0.05)


def test_a_world_like_the_kernels_is_left_as_it_is() -> None:
    seconds, shares = truth({"bf16": 1.0, "int8-g64": 1.0, "int4-g64": 1.0}, 4.0)
    found = whole.fit(tensors(), ALONE, seconds, shares)
    assert {**found.own, **found.scale} == pytest.approx({"bf16": 1.0, "int8-g64": 1.0, "int4-g64": 1.0}, rel=0.02)


def test_a_wild_measurement_moves_costs_so_far_only() -> None:
    found = whole.fit(tensors(), ALONE, 20.0, {"int8-g64": 300.0, "int4-g64": 0.5})
    assert found.scale["int8-g64"] == whole.MOST
    assert all(1 / whole.MOST <= v <= whole.MOST for v in found.scale.values())


def test_a_format_that_some_matrices_had_already() -> None:
    """The last one is in int8 as it is: it counts with what stays, by the factor of what stays."""
    made = [*tensors()[:2], replace(tensors()[2], format="int8-g64", choices=(KEEP, SMALL))]
    scale, own, rest = {"int8-g64": 1.5, "int4-g64": 0.8}, 1.2, 3.0
    before = rest + own * sum(row[0] for row in ALONE)
    large = rest + 1.5 * (ALONE[0][1] + ALONE[1][1]) + own * ALONE[2][0]
    small = rest + 0.8 * (ALONE[0][2] + ALONE[1][2] + ALONE[2][1])
    known = Whole(before, own={"bf16": own, "int8-g64": own})
    shares = {"int8-g64": large / before, "int4-g64": small / before}
    assert whole.scales(made, ALONE, known, shares, rest / before) == pytest.approx(scale)
    costs = replace(known, scale=scale).scaled(made, ALONE)
    assert [row[0] for row in costs] == pytest.approx([own * row[0] for row in ALONE])
    assert costs[0][1] == pytest.approx(1.5 * ALONE[0][1])


OBJECTIVE = Objective(prompt=16, new=48)


@dataclass
class Job:
    clock: Clock
    settings: SimpleNamespace
    key: str = "k"
    given_key: str = "k"
    kernels: str = "here"
    objective: Objective = OBJECTIVE
    threads: int = 1
    packed: int = 0
    graph: Graph = field(default_factory=tiny_graph)


def job(minutes: float | None = None) -> Job:
    return Job(Clock(minutes), SimpleNamespace(minutes=minutes))


@pytest.mark.parametrize(
    ("seconds", "prompts", "minutes", "new"),
    [
        (0.001, 0.1, None, 48),  # ten models and four times the original, three times five rounds: 0.57 s for each
        (0.05, 0.1, None, 9),  # 0.47 s beside the prompt
        (0.05, 0.4, None, 0),  # not eight tokens
        (0.05, 0.01, 10, 0),  # a twentieth of ten minutes is 30 s
        (0.005, 0.01, 10, 26),
    ],
)
def test_as_many_tokens_as_there_is_time_for(seconds: float, prompts: float, minutes: float | None, new: int) -> None:
    assert whole._new(job(minutes), seconds, prompts, 10) == new


def test_as_many_at_once_as_memory_holds() -> None:
    asked = job()
    assert whole.together(asked) == 3
    each = 2 * asked.graph.parameters()
    asked.packed = 20 * each
    few = whole.together(asked)
    assert 3 <= few < 10  # caches and buffers take room as well
    asked.packed = 10**9
    assert whole.together(asked) > 10


def test_models_are_timed_once(tmp_path, monkeypatch) -> None:
    calls: list[int] = []
    seconds, shares = truth({"bf16": 1.0, "int8-g64": 1.5, "int4-g64": 1.2}, 4.0)

    def timed(job, candidates, rounds):
        calls.append(len(candidates))
        run = SimpleNamespace(decode_tokens_per_second=1 / seconds * 1e3, prefill_tokens_per_second=1e5)
        gains = [SimpleNamespace(estimate=1 / shares[name]) for name in ("int4-g64", "int8-g64")]
        return run, [SimpleNamespace(gain=lambda _, g=g: g) for g in gains[: len(candidates)]]

    monkeypatch.setattr(whole.prove, "timed", timed)
    monkeypatch.setattr(whole, "_uniform", lambda job, tensors, name: lambda: {"w": name})
    alone = [[v / 1e3 for v in row] for row in ALONE]
    with Trials(tmp_path / "w", keep=True) as trials:
        first, again = (whole.measure(job(), tensors(), alone, trials) for _ in range(2))
    assert calls == [0, 2]
    assert first == again
    assert first.seconds == pytest.approx(seconds / 1e3)
    assert first.scale == pytest.approx(whole.fit(tensors(), ALONE, seconds, shares).scale)
    # Another shape of it, half as large: what no matrix takes is known, and so is what an untouched one does.
    space = Space(tensors(), first.scaled(tensors(), alone), ALONE, whole=first)
    small = [[v / 2 for v in row] for row in alone]
    with Trials(tmp_path / "other", keep=True) as trials:
        again = whole.measure(replace(job(), key="shape"), tensors(), small, trials, space)
    assert again.seconds == first.seconds
    rest = 1 - space.original_cost / first.seconds
    assert again.scale == whole.scales(tensors(), small, first, shares, rest)
    # With nothing to time, or nothing of the kind timed of the model that was given, nothing is.
    calls.clear()
    bare = [replace(t, choices=(KEEP,)) for t in tensors()]
    with Trials(tmp_path / "none", keep=True) as trials:
        assert whole.measure(job(), bare, alone, trials).scale == {}
        unknown = replace(space, whole=Whole(seconds / 1e3))
        assert whole.measure(replace(job(), key="shape"), tensors(), small, trials, unknown) == unknown.whole
    assert calls == [0]  # the original, once for all shapes
