from __future__ import annotations

from pathlib import Path

import pytest

from hasten.compress.recipe import KEEP, Choice
from hasten.search import cost
from hasten.search.candidates import Tensor
from hasten.search.cost import Site
from hasten.search.objective import Objective
from hasten.search.trials import Trials

DECODE, PREFILL, MEMORY = (Objective(name) for name in ("decode", "prefill", "memory"))
SMALL = Choice("int4-g32", "clip")


def tensor(name: str, shape: tuple[int, int] = (64, 96), linears: int = 1, at_rows: bool = False) -> Tensor:
    return Tensor(name, shape, "bf16", 0, linears, 0, at_rows, (KEEP, SMALL))


def test_what_is_timed() -> None:
    tensors = [tensor("b.0.q"), tensor("b.1.q"), tensor("embed", linears=0), tensor("head", (128, 64), at_rows=True)]
    assert cost.sites(tensors, DECODE) == {
        Site((64, 96), "bf16", 1): 2,
        Site((64, 96), "int4-g32", 1): 2,
        Site((128, 64), "bf16", 1): 1,
        Site((128, 64), "int4-g32", 1): 1,
    }
    prefill = cost.sites(tensors, PREFILL)
    assert Site((64, 96), "bf16", 512) in prefill
    assert Site((128, 64), "bf16", 1) in prefill  # a prompt's last row only
    assert cost.sites(tensors, MEMORY) == {}


def test_costs_follow_times_and_bytes() -> None:
    times = {Site((64, 96), "bf16", 1): 3.0, Site((64, 96), "int4-g32", 1): 1.0}
    assert cost.costs(tensor("q"), DECODE, times) == [3.0, 1.0]
    assert cost.costs(tensor("tied", linears=2), DECODE, times) == [6.0, 2.0]
    assert cost.costs(tensor("embed", linears=0), DECODE, times) == [0.0, 0.0]
    assert cost.costs(tensor("q"), MEMORY, {}) == [64 * 96 * 2.0, 64 * 96 * (4 + 16 / 32) / 8]


@pytest.mark.parametrize("format", ["f32", "bf16", "int8-g64", "codebook4-g32"])
def test_a_larger_matrix_takes_longer(format: str, monkeypatch) -> None:
    """Sixteen times the work: far apart enough for any clock."""
    monkeypatch.setattr(cost, "SECONDS", 0.005)
    for tokens in (1, 32):
        small, large = (cost.seconds(Site((n, n), format, tokens), 0, threads=1) for n in (128, 512))
        assert 0 < small < large


def test_measured_once(tmp_path: Path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(cost, "seconds", lambda site, cold, threads: calls.append((site, cold)) or 0.5)
    with Trials(tmp_path / "w", keep=True) as trials:
        for _ in range(2):
            found = cost.measure([tensor("q"), tensor("k")], DECODE, 1, trials, "k", lambda *a: None)
            assert set(found.values()) == {0.5}
    assert len(calls) == 2
