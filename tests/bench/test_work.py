from __future__ import annotations

import pytest
from bench.shapes import HEAD_DIM, HEADS, KV_HEADS, pack, tiny

from hasten.bench.machine import Limits
from hasten.bench.work import count

INT8_BYTES = 1 + 2 / 32  # a code and its part of an f16 scale; WIDTH and the rows are whole panels and groups


def test_macs_by_kind_and_place() -> None:
    graph = tiny(tied=False)
    work = count(graph, pack(graph, {"wk": "bf16", "head": "bf16"}))
    assert work.token_macs == (64 * 64 + 32 * 64, 32 * 64)
    assert work.row_macs == (0, 96 * 64)


def test_bytes_of_an_untied_model() -> None:
    graph = tiny(tied=False)
    work = count(graph, pack(graph, {}))
    matrices = 64 * 64 + 32 * 64 + 32 * 64 + 96 * 64
    vectors = 4 * (64 + 64)
    assert work.step_bytes == matrices * INT8_BYTES + vectors
    assert work.token_bytes == 64 * INT8_BYTES
    assert work.bits_per_weight == pytest.approx(8.5)
    assert work.parameters == matrices + 96 * 64 + 128


def test_a_tied_table_is_read_once() -> None:
    graph = tiny(tied=True)
    work = count(graph, pack(graph, {}))
    assert work.step_bytes == (64 * 64 + 2 * 32 * 64 + 96 * 64) * INT8_BYTES + 4 * 128
    assert work.token_bytes == 0
    assert work.row_macs == (96 * 64, 0)


@pytest.mark.parametrize(("window", "positions"), [(None, [1, 2, 3, 4, 5]), (3, [1, 2, 3, 3, 3]), (9, [1, 2, 3, 4, 5])])
def test_attention_counts_what_the_mask_lets_through(window: int | None, positions: list[int]) -> None:
    graph = tiny(tied=True, window=window)
    work = count(graph, pack(graph, {}))
    assert work.attention_macs(5) == 2 * HEADS * HEAD_DIM * sum(positions)
    cache = work.decode_bytes(4, 7) - work.step_bytes
    assert cache == 7 * 2 * KV_HEADS * HEAD_DIM * positions[4] * 2


def test_least_times_follow_from_the_limits() -> None:
    graph = tiny(tied=True)
    work = count(graph, pack(graph, {}), kv_format="f32")
    limits = Limits(memory_read_gbs=2.0, int8_gmacs=10.0, bf16_gmacs=5.0, threads=1)
    integer = (64 * 64 + 2 * 32 * 64) * 3 + 96 * 64
    attention = 2 * HEADS * HEAD_DIM * (1 + 2 + 3)
    assert work.prompt_seconds(3, limits) == pytest.approx(integer / 10e9 + attention / 5e9)
    steps = [work.step_bytes + 2 * (2 * KV_HEADS * HEAD_DIM * (p + 1) * 4) for p in (3, 4)]
    assert work.decode_seconds(3, 2, 2, limits) == pytest.approx(sum(steps) / 2e9)
    fast = Limits(memory_read_gbs=1e6, int8_gmacs=10.0, bf16_gmacs=5.0, threads=1)  # products take longer than bytes
    products = 2 * (64 * 64 + 2 * 32 * 64 + 96 * 64) / 10e9 + 2 * HEADS * HEAD_DIM * (4 + 5) / 5e9
    assert work.decode_seconds(3, 2, 8, fast) == pytest.approx(8 * products)
