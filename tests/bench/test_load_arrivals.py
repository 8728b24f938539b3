"""When requests come, how long they are and what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.bench.load import arrivals, prompts
from hasten.bench.load.arrivals import Load, Schedule, planned
from hasten.bench.load.prompts import Bodies, Prompts
from hasten.bench.load.traces import Arrival
from hasten.errors import InputError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [7, 8]},
        {"timestamp": 500, "input_length": 2000, "output_length": 20, "hash_ids": [7, 9, 10, 11]},
        {"timestamp": 2000, "input_length": 100, "output_length": 30, "hash_ids": [12]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_poisson_arrivals() -> None:
    found = planned(Schedule(Load(rate=50.0, limit=20_000, seed=3)))
    gaps = np.diff([0.0, *(a.at for a in found)])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # exponential: as much spread as mean
    below = np.mean(gaps < np.log(2) / 50)
    assert below == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_the_same_seed_is_the_same_load() -> None:
    def load(seed: int) -> list[Arrival]:
        return planned(Schedule(Load(rate=5.0, limit=50, seed=seed)))

    assert load(1) == load(1)
    assert load(1) != load(2)


def test_lengths_are_even_over_their_range() -> None:
    found = planned(Schedule(Load(rate=1.0, prompt=(3, 7), new=9, prefix=100, limit=5000)))
    lengths, counts = np.unique([a.prompt for a in found], return_counts=True)
    assert lengths.tolist() == [103, 104, 105, 106, 107]
    assert counts.min() > 850
    assert {a.new for a in found} == {9}


def test_duration_ends_arrivals() -> None:
    found = planned(Schedule(Load(rate=100.0, duration=20.0)))
    assert found[-1].at < 20
    assert len(found) == pytest.approx(2000, rel=0.1)


def test_a_closed_loop_has_no_times_and_no_end() -> None:
    found = list(islice(Schedule(Load(clients=4, duration=1.0)), 1000))
    assert len(found) == 1000
    assert {a.at for a in found} == {0.0}


def test_a_trace_has_its_own_times(trace: Path) -> None:
    found = planned(Schedule(Load(trace=trace)))
    assert [(a.at, a.prompt, a.new, a.blocks) for a in found] == [
        (0.0, 1000, 10, (7, 8)),
        (0.5, 2000, 20, (7, 9, 10, 11)),
        (2.0, 100, 30, (12,)),
    ]
    assert [a.at for a in planned(Schedule(Load(trace=trace, time_scale=0.5)))] == [0.0, 0.25, 1.0]
    assert [a.at for a in planned(Schedule(Load(trace=trace, duration=0.6)))] == [0.0, 0.5]
    assert [a.prompt for a in planned(Schedule(Load(trace=trace, limit=1)))] == [1000]


def test_a_trace_at_another_rate(trace: Path) -> None:
    found = planned(Schedule(Load(trace=trace, rate=10.0)))
    plain = planned(Schedule(Load(rate=10.0, limit=3)))
    assert [a.at for a in found] == [a.at for a in plain]
    assert [a.prompt for a in found] == [1000, 2000, 100]
    assert [a.at for a in planned(Schedule(Load(trace=trace, clients=2)))] == [0.0, 0.0, 0.0]


def test_a_trace_made_smaller(trace: Path) -> None:
    found = planned(Schedule(Load(trace=trace, length_scale=0.01)))
    assert [(a.prompt, a.new, a.block) for a in found] == [(10, 1, 5), (20, 1, 5), (1, 1, 5)]
    schedule = Schedule(Load(trace=trace, context=1010))
    assert [a.prompt for a in planned(schedule)] == [1000, 100]
    assert schedule.left_out == 1
    assert [a.prompt for a in planned(Schedule(Load(trace=trace, context=1009)))] == [100]
    with pytest.raises(InputError, match="no request to send; 3 are longer than the context"):
        planned(Schedule(Load(trace=trace, context=5)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "nothing says when requests come"),
        ({"rate": 1.0}, "nothing says when the load is over"),
        ({"clients": 1}, "nothing says when the load is over"),
        ({"rate": 1.0, "clients": 1, "limit": 1}, "--rate and --clients are two kinds of load"),
        ({"rate": 0.0, "limit": 1}, "--rate is 0.0"),
        ({"rate": float("nan"), "limit": 1}, "--rate is nan"),
        ({"rate": float("inf"), "limit": 1}, "--rate is inf"),
        ({"clients": 0, "limit": 1}, "--clients is 0"),
        ({"clients": 1_000_000, "limit": 1}, "--clients is 1000000"),
        ({"clients": 1, "limit": 0}, "--limit-requests is 0"),
        ({"clients": 1, "duration": -1.0}, "--duration is -1.0"),
        ({"clients": 1, "limit": 1, "prompt": (5, 4)}, "a prompt of 5:4 tokens"),
        ({"clients": 1, "limit": 1, "prompt": (0, 4)}, "a prompt of 0:4 tokens"),
        ({"clients": 1, "limit": 1, "new": 0}, "--new is 0"),
        ({"clients": 1, "limit": 1, "seed": -1}, "--seed is -1"),
        ({"clients": 1, "limit": 1, "time_scale": 2.0}, "--time-scale stretches"),
        ({"trace": Path("x"), "rate": 1.0, "time_scale": 2.0}, "--time-scale stretches"),
        ({"clients": 1, "limit": 1, "length_scale": 2.0}, "--length-scale goes with --trace"),
        ({"clients": 1, "limit": 1, "context": 9}, "--context goes with --trace"),
        ({"trace": Path("x"), "prefix": 5}, "--prefix goes without --trace"),
    ],
)
def test_contradictions(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Load(**wrong)
    assert message in caught.value.message


def test_too_many_requests_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MOST_REQUESTS", 100)
    assert len(planned(Schedule(Load(rate=1.0, limit=100)))) == 100
    with pytest.raises(InputError, match="more than 100 requests"):
        planned(Schedule(Load(rate=1e4, duration=1.0)))


# --- prompts

IDS = [str(i) for i in range(1000)]


def drawn(made: Prompts, arrival: Arrival, number: int) -> list[str]:
    return made.pieces(arrival, number).tolist()


def test_the_same_hash_is_the_same_tokens() -> None:
    made = Prompts(IDS, seed=0)
    a = drawn(made, Arrival(0, 1100, 1, (5, 6, 7)), 0)
    b = drawn(made, Arrival(0, 1100, 1, (5, 6, 8)), 1)
    c = drawn(made, Arrival(0, 600, 1, (5, 6)), 2)
    d = drawn(made, Arrival(0, 600, 1), 3)
    assert (len(a), len(b), len(c), len(d)) == (1100, 1100, 600, 600)
    assert a[:1024] == b[:1024]
    assert a[1024:] != b[1024:]
    assert c == a[:600]
    assert d[:100] != a[:100]
    short = drawn(made, Arrival(0, 8, 1, (5, 6), block=5), 4)
    assert short[:5] == a[:5]
    assert len(short) == 8


def test_prompts_are_a_seed_s_and_a_number_s() -> None:
    one, same, other = Prompts(IDS, seed=1), Prompts(IDS, seed=1), Prompts(IDS, seed=2)
    arrival = Arrival(0, 64, 1)
    assert drawn(one, arrival, 9) == drawn(same, arrival, 9)
    assert drawn(one, arrival, 9) != drawn(one, arrival, 8)
    assert drawn(one, arrival, 9) != drawn(other, arrival, 9)


def test_a_prefix_is_shared() -> None:
    made = Prompts(IDS, seed=0, prefix=50)
    a, b = (drawn(made, Arrival(0, 60, 1), n) for n in (0, 1))
    assert a[:50] == b[:50]
    assert a[50:] != b[50:]
    assert len(a) == 60


def body(pieces: Sequence[str] = IDS, **options: Any) -> dict[str, Any]:
    value = json.loads(Bodies(Prompts(pieces, seed=0), "m", **options).body(Arrival(0, 40, 7), 3))
    assert isinstance(value, dict)
    return value


def test_bodies() -> None:
    plain = body()
    tokens = plain.pop("prompt")
    assert len(tokens) == 40
    assert all(type(t) is int and 0 <= t < 1000 for t in tokens)
    assert plain == {
        "model": "m",
        "stream": True,
        "temperature": 0.0,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "min_tokens": 7,
        "max_tokens": 7,
    }
    assert not body(standard=True).keys() & {"ignore_eos", "min_tokens"}
    assert "stream_options" not in body(usage=False)
    assert body(extra={"top_k": 4, "ignore_eos": None})["top_k"] == 4
    assert body(extra={"top_k": 4, "ignore_eos": None})["ignore_eos"] is None


def test_bodies_of_words() -> None:
    words = body(prompts.COMMON, text=True)["prompt"]
    assert len(words.split()) == 40
    assert set(words.split()) <= set(prompts.COMMON)
    chat = body(prompts.COMMON, chat=True)
    assert chat["messages"] == [{"role": "user", "content": words}]
    assert "prompt" not in chat
    assert len(set(prompts.COMMON)) == len(prompts.COMMON) > 150


def test_words_of_a_vocabulary() -> None:
    alphabet = "abcdefghijklmnopqrst"
    tokens = [None, "<s>", "a", "\u0120", "\u0120A1", *(f"\u0120{c}x" for c in alphabet), "\u2581yes", '\u0120"\\']
    assert prompts.word_pieces(tokens) == [*(f"{c}x" for c in alphabet), "yes"]
    with pytest.raises(InputError, match="the tokenizer has 1 plain words"):
        prompts.word_pieces(["\u0120one", "two"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--extra is not valid JSON"),
        ("[" * 100_000, "--extra is not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"stream": false}', "--extra sets stream"),
        ('{"prompt": "x"}', "--extra sets prompt"),
    ],
)
def test_extra_fields_are_checked(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prompts.parse_extra(text)


@pytest.mark.parametrize(("low", "high"), [(5, 5), (6, 5), (0, 1 << 30)])
def test_ids_are_a_range(low: int, high: int) -> None:
    with pytest.raises(InputError, match="--ids is"):
        prompts.id_pieces(low, high)
