from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.shapes import pack, tiny

from hasten.bench import against, against_chart, against_report, machine
from hasten.bench.contenders import Contender, Field, bits_class
from hasten.bench.peers.common import PeerError, Prepared, Variant, Workload
from hasten.bench.work import count

LIMITS = machine.Limits(memory_read_gbs=10.0, int8_gmacs=100.0, bf16_gmacs=50.0, threads=1)
PREFILL = Workload("prefill-8", "prefill", tokens=8)
DECODE = Workload("decode-2", "decode", batch=2, depth=4, new=5)
COLD = Workload("ttft-cold", "ttft-cold", tokens=8)


class Fake:
    """Stands in for a runner: answers with seconds from a list, writes down who was asked for what."""

    def __init__(self, name: str, log: list[str], seconds: list[float], fail: str = "") -> None:
        self.name, self.log, self.seconds, self.fail, self.closed = name, log, list(seconds), fail, 0

    def call(self, call: str, **arguments: Any) -> dict[str, Any]:
        if call in ("load", "first_token"):
            return {"seconds": 0.0}
        if call == "peak":
            return {"bytes": 1000}
        self.log.append(f"{self.name}{'+' if arguments.get('flash') else ''}")
        if self.fail:
            raise PeerError(self.fail)
        return {"seconds": self.seconds.pop(0), "via": "a fake"}

    def close(self) -> None:
        self.closed += 1


def contender(fake: Fake, peer: str, bits: int = 4, choices: Any = None) -> Contender:
    return Contender(
        name=f"{peer} {fake.name}",
        peer=peer,
        variant=Variant(fake.name, bits),
        prepared=Prepared({}, step_bytes=1000, file_bytes=2000),
        version="1",
        start=lambda: fake,  # type: ignore[arg-type, return-value]
        choices=lambda workload: [{}] if choices is None else choices,
    )


def field(*contenders: Contender) -> Field:
    graph = tiny(tied=True)
    return Field(list(contenders), [], {4: count(graph, pack(graph, {}))})


@pytest.fixture(autouse=True)
def fixed_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "limits", lambda seconds=0.2, threads=0: LIMITS)


def quiet(stage: str, done: int, total: int) -> None:
    pass


def measured(found: Field, workload: Workload = PREFILL, rounds: int = 3) -> dict[str, Any]:
    return against.measure(found, workload, rounds, 1, quiet)


def test_engines_take_turns_and_ratios_are_of_the_same_round() -> None:
    log: list[str] = []
    # The first is the trial, the third a disturbance of both.
    ours = contender(Fake("a", log, [0.9, 0.125, 1.0, 0.25]), "hasten")
    theirs = contender(Fake("b", log, [0.9, 0.375, 3.0, 1.0]), "openvino")
    found = measured(field(ours, theirs))
    assert log == ["a", "b"] + ["a", "b"] * 3
    ratio = found["ratios"]["hasten a"]["peers"]["openvino b"]
    assert ratio == {"median": 3.0, "low": 3.0, "high": 4.0}
    assert found["ratios"]["hasten a"]["best"] == "openvino b"
    assert found["engines"]["hasten a"]["median"] == pytest.approx(8 / 0.25)
    assert found["engines"]["hasten a"]["low"] == pytest.approx(8 / 1.0)
    assert len(found["limits"]) == 3


def test_the_fastest_choice_is_measured() -> None:
    log: list[str] = []
    fake = Fake("b", log, [2.0, 1.4, 1.3, 1.0, 1.5])
    found = measured(field(contender(fake, "llama.cpp", choices=[{"flash": False}, {"flash": True}])), rounds=1)
    assert log == ["b", "b+", "b", "b+", "b+"]
    assert found["engines"]["llama.cpp b"]["choice"] == {"flash": True}
    assert found["engines"]["llama.cpp b"]["seconds"] == [1.5]


def test_the_best_peer_is_the_fastest_of_its_size_or_of_16_bits() -> None:
    log: list[str] = []
    ours = contender(Fake("a", log, [1.0] * 9), "hasten")
    slow = contender(Fake("b", log, [4.0] * 9), "openvino")
    wide = contender(Fake("c", log, [3.0] * 9), "transformers", bits=16)
    other = contender(Fake("d", log, [0.5] * 9), "llama.cpp", bits=8)
    found = measured(field(ours, slow, wide, other))["ratios"]["hasten a"]
    assert set(found["peers"]) == {"openvino b", "transformers c"}
    assert found["best"] == "transformers c"


def test_a_slow_engine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "SLOW_SECONDS", 5.0)
    log: list[str] = []
    ours = contender(Fake("a", log, [1.0, 1.0, 2.0, 3.0]), "hasten")
    slow = contender(Fake("b", log, [10.0]), "transformers", bits=16)
    found = measured(field(ours, slow))
    assert log == ["a", "b", "a", "a", "a"]
    assert found["ratios"]["hasten a"]["peers"]["transformers b"] == {"median": 5.0, "low": 5.0, "high": 5.0}


def test_a_failure_is_reported_and_the_others_go_on() -> None:
    log: list[str] = []
    bad = Fake("b", log, [], fail="out of luck")
    found = measured(field(contender(Fake("a", log, [1.0] * 4), "hasten"), contender(bad, "openvino")))
    assert found["engines"]["openvino b"]["error"] == "out of luck"
    assert len(found["engines"]["hasten a"]["seconds"]) == 3
    assert found["ratios"]["hasten a"] == {"peers": {}, "best": None}
    assert bad.closed == 1


def test_shares_of_the_limit_are_of_the_engines_own_bytes() -> None:
    one = contender(Fake("a", [], [9, 2.0]), "hasten")
    found = measured(field(one), DECODE, rounds=1)["engines"]["hasten a"]
    graph = tiny(tied=True)
    work = replace(count(graph, pack(graph, {})), step_bytes=1000, kv_bytes=2)
    assert found["share_of_limit"] == pytest.approx(work.decode_seconds(4, 5, 2, LIMITS) / 2.0)
    assert found["median"] == pytest.approx(2 * 5 / 2.0)


def test_from_cold_every_round_has_a_process_of_its_own() -> None:
    fake = Fake("a", [], [0.1] * 9)
    found = measured(field(contender(fake, "hasten")), COLD, rounds=2)["engines"]["hasten a"]
    assert fake.closed == 2
    assert found["unit"] == "ms"
    assert found["peak"] == 1000
    assert "share_of_limit" not in found


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    log: list[str] = []

    def go(key: str, *workloads: Workload) -> list[dict[str, Any]]:
        found = field(contender(Fake("a", log, [1.0] * 20), "hasten"))
        return against.run(found, workloads, rounds=1, threads=1, output=tmp_path, key=key, report=quiet)

    first = go("k", PREFILL)
    asked = len(log)
    again = go("k", PREFILL, DECODE)
    assert again[0] == json.loads(json.dumps(first[0]))
    assert len(log) == 2 * asked  # only the new workload
    go("another", PREFILL)
    assert len(log) == 3 * asked


def report() -> dict[str, Any]:
    ours = contender(Fake("int4", [], [9.0, 1.0, 2.0] * 9), "hasten")
    theirs = contender(Fake("Q4_0", [], [9.0, 3.0, 4.0] * 9), "llama.cpp")
    bad = contender(Fake("x", [], [], fail="out of luck"), "openvino")
    found = Field([ours, theirs, bad], [{"peer": "transformers", "reason": "not installed: no wheel"}], field().works)
    results = [measured(found, w, rounds=2) for w in (PREFILL, DECODE)]
    return against_report.document(
        found, results, source="folder/demo", random=True, rounds=2, threads=1, left_out=["depth-4096"]
    )


def test_table_and_markdown_say_everything() -> None:
    found = report()
    for text in (against_report.table(found), against_report.markdown([found])):
        for words in ("2.50x (2.00-3.00) *", "not installed: no wheel", "out of luck", "depth-4096", "memory read 10"):
            assert words in text
    assert json.loads(json.dumps(found)) == found


def test_a_busy_machine_is_named() -> None:
    found = report()
    assert "the machine was busy" not in against_report.table(found)
    found["workloads"][1]["limits"][0]["int8_gmacs"] = 51.0  # of 100 in the other round
    line = next(line for line in against_report.table(found).splitlines() if "the machine was busy" in line)
    assert found["workloads"][1]["name"] in line
    assert found["workloads"][0]["name"] not in line


def test_one_round_has_no_range() -> None:
    assert against_report.times({"median": 2.0, "low": 2.0, "high": 2.0}) == "2.00x"


def test_the_plot_shows_the_ratio_to_the_best_peer_and_shares(tmp_path: Path) -> None:
    written = against_chart.write(report(), tmp_path / "report.svg")
    text = written[0].read_text()
    assert "hasten int4, prefill-8: 2.5 times" in text
    assert text.count("stroke-dasharray") == 2


@pytest.mark.parametrize(("bits", "expected"), [(4.1, 4), (4.5, 4), (3.1, 4), (8.5, 8), (6.0, 8), (16.0, 16)])
def test_sizes_are_compared_with_the_nearest_that_peers_have(bits: float, expected: int) -> None:
    assert bits_class(bits) == expected
