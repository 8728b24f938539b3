from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench.shapes import pack, tiny

from hasten.bench import latency, machine
from hasten.bench.work import count
from hasten.errors import ContextError, InputError

LIMITS = machine.Limits(memory_read_gbs=10.0, int8_gmacs=100.0, bf16_gmacs=50.0, threads=1)


class Recorder:
    """Stands in for a compiled program: writes down every step and draws tokens that name their row."""

    def __init__(self, graph: Any, weights: Any, limits: Any, tune: bool) -> None:
        self.limits, self.steps, self.drawn = limits, [], 0

    def step(self, batch: Any) -> Any:
        assert len(batch.tokens) <= self.limits.max_tokens
        assert len(batch.starts) - 1 <= self.limits.max_sequences
        assert len(batch.rows) <= self.limits.max_rows
        assert batch.block_tables.max() < self.limits.kv_blocks
        self.steps.append(batch)
        return SimpleNamespace(sample=self.sample)

    def sample(self, sampling: Any) -> Any:
        count = len(sampling.temperature)
        self.drawn += count
        return SimpleNamespace(tokens=np.arange(self.drawn - count, self.drawn, dtype=np.int32))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> latency.Loaded:
    monkeypatch.setattr(latency.native, "compile", Recorder)
    monkeypatch.setattr(latency, "STEP_TOKENS", 16)
    graph = tiny(tied=True)
    return latency.Loaded(graph, pack(graph, {}), prompt=21, new=3, batch=4)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_prefill_feeds_every_prompt_once_and_in_order(loaded: latency.Loaded, batch: int) -> None:
    loaded.prefill(batch)
    steps = loaded.program.steps  # type: ignore[attr-defined]
    assert [len(s.tokens) for s in steps[:-1]] == [16] * (len(steps) - 1)
    fed: dict[tuple[int, ...], list[int]] = {}
    wanted = []
    for step in steps:
        for i, table in enumerate(step.block_tables):
            span = slice(step.starts[i], step.starts[i + 1])
            fed.setdefault(tuple(table), []).extend(step.positions[span].tolist())
        wanted += step.positions[step.rows].tolist()
    assert list(fed.values()) == [list(range(21))] * batch
    assert wanted == [20] * batch
    assert len({block for table in fed for block in table}) == batch  # blocks of 32: one each, none shared


def test_decode_feeds_back_what_was_drawn(loaded: latency.Loaded) -> None:
    loaded.prefill(3)
    first = loaded._last[:3].copy()
    loaded.program.steps.clear()  # type: ignore[attr-defined]
    loaded.decode(3)
    steps = loaded.program.steps  # type: ignore[attr-defined]
    assert [s.positions.tolist() for s in steps] == [[21] * 3, [22] * 3, [23] * 3]
    assert steps[0].tokens.tolist() == first.tolist()
    assert [s.tokens.tolist() for s in steps[1:]] == [[3, 4, 5], [6, 7, 8]]
    assert all(s.rows.tolist() == [0, 1, 2] for s in steps)


class Clockwork:
    """A subject that says how long it took."""

    def __init__(self, name: str, log: list[str], seconds: list[float]) -> None:
        graph = tiny(tied=True)
        self.work, self.prompt, self.new = count(graph, pack(graph, {})), 8, 4
        self.name, self.log, self.seconds, self.calls = name, log, seconds, 0

    def prefill(self, batch: int) -> float:
        self.log.append(f"{self.name}{batch}")
        return 10.0

    def decode(self, batch: int) -> float:
        self.calls += 1
        return self.seconds[self.calls - 1]

    def warm_up(self, batch: int) -> None:
        self.prefill(batch)
        self.decode(batch)


@pytest.fixture
def fixed_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "limits", lambda threads=0: LIMITS)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 0)
    monkeypatch.setattr(latency, "ENOUGH_SECONDS", 0.0)


@pytest.mark.usefixtures("fixed_limits")
def test_pairs_take_turns_and_ratios_are_of_neighbours() -> None:
    log: list[str] = []
    slow = Clockwork("a", log, [99, 4.0, 40.0, 6.0])  # the first is the warm-up, the third a disturbance of both
    fast = Clockwork("b", log, [99, 2.0, 20.0, 2.0])
    (pair,) = latency.compare(slow, fast, [2], rounds=3)
    assert log == ["a2", "b2"] + ["a1", "a2", "b1", "b2"] * 3
    assert pair.decode == latency.Ratio(2.0, 2.0, 3.0)
    assert pair.prefill == latency.Ratio(1.0, 1.0, 1.0)
    assert pair.first.decode_tokens_per_second == pytest.approx(2 * 4 / 6.0)


@pytest.mark.usefixtures("fixed_limits")
def test_rates_and_shares() -> None:
    subject = Clockwork("a", [], [99, 0.5, 0.5])
    (((run,), _),) = latency.time_in_turn([subject], [2], rounds=2)
    assert run.prefill_tokens_per_second == pytest.approx(2 * 8 / 10)
    assert run.decode_tokens_per_second == pytest.approx(2 * 4 / 0.5)
    assert run.decode_tokens_per_second_per_parameter == pytest.approx(16 / subject.work.parameters)
    assert run.ttft_ms == pytest.approx(10_000)
    assert run.prefill_share_of_limit == pytest.approx(2 * subject.work.prompt_seconds(8, LIMITS) / 10)
    assert run.decode_share_of_limit == pytest.approx(subject.work.decode_seconds(8, 4, 2, LIMITS) / 0.5)
    assert run.rounds == 2
    assert not run.fits_cache


@pytest.mark.usefixtures("fixed_limits")
def test_short_measurements_go_on_until_they_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "ENOUGH_SECONDS", 1e9)
    subject = Clockwork("a", [], [0.5] * 100)
    (((run,), _),) = latency.time_in_turn([subject], [1], rounds=2)
    assert run.rounds == latency.MAX_ROUNDS


@pytest.mark.usefixtures("fixed_limits")
@pytest.mark.parametrize(("seconds", "calls"), [(0.2, 3), (0.4, 1)])
def test_what_is_short_is_decoded_again_in_turn(seconds: float, calls: int) -> None:
    log: list[str] = []
    pair = [Clockwork(name, log, [99, *(seconds + d for d in (0.0, 0.02, 0.01)[:calls])]) for name in "ab"]
    ((_, times),) = latency.time_in_turn(pair, [1], rounds=1, decodes=3)
    assert [[t.decode for t in own] for own in times] == [[pytest.approx(seconds + 0.01 * (calls > 1))]] * 2
    assert [own.calls for own in pair] == [1 + calls] * 2  # the warm-up is one


@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ({"prompt": 0}, InputError, "prompt is 0"),
        ({"new": -1}, InputError, "new is -1"),
        ({"batch": []}, InputError, "no batch size"),
        ({"batch": [1, 0]}, InputError, "batch is 0"),
        ({"rounds": 0}, InputError, "rounds is 0"),
        ({"prompt": 60, "new": 5}, ContextError, "65 tokens, the model's context is 64"),
    ],
)
def test_wrong_sizes_are_refused(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], error: type[Exception], words: str
) -> None:
    monkeypatch.setattr(latency.native, "compile", Recorder)
    graph = tiny(tied=True)
    with pytest.raises(error, match=words):
        latency.measure(graph, pack(graph, {}), **{"prompt": 4, "new": 2, **sizes})


def test_a_tiny_model_on_this_machine() -> None:
    graph = tiny(tied=True)
    weights = pack(graph, {})
    runs = latency.measure(graph, weights, prompt=20, new=4, batch=[1, 2], rounds=1)
    assert [r.batch for r in runs] == [1, 2]
    for run in runs:
        assert run.decode_tokens_per_second > 0
        assert run.ttft_ms > 0
        if run.batch == 1:  # the first token of one prompt is its prefill, measured once
            assert run.prefill_tokens_per_second == pytest.approx(20 * 1e3 / run.ttft_ms, rel=1e-6)
        shares = run.prefill_share_of_limit / run.ttft_share_of_limit
        assert shares == pytest.approx(run.prefill_tokens_per_second * run.ttft_ms / (20 * 1e3), rel=1e-6)
        assert 0 < run.prefill_share_of_limit < 1
    (pair,) = latency.measure_pair((graph, weights), (graph, weights), prompt=20, new=4, rounds=3)
    assert pair.decode.low <= pair.decode.median <= pair.decode.high
    assert replace(pair.first, batch=1) == pair.first
