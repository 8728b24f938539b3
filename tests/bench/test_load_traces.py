"""Traces of both formats: what they say is what the csv and json modules read, and what is wrong in them is named."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import need_shared_data

from hasten.bench.load import traces
from hasten.bench.load.traces import Arrival
from hasten.errors import InputError

HEADER = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "trace"
    path.write_bytes(data)
    return path


def test_azure(tmp_path: Path) -> None:
    rows = (
        b"2023-11-16 18:17:03.9799600,4808,10\r\n\r\n2023-11-16 18:17:04.0319600,3180,8\r\n2023-11-17 00:00:00,1,1\r\n"
    )
    found = list(traces.read(written(tmp_path, b"\xef\xbb\xbf" + HEADER.replace(b"\n", b"\r\n") + rows)))
    assert [(a.prompt, a.new, a.blocks) for a in found] == [(4808, 10, ()), (3180, 8, ()), (1, 1, ())]
    assert [a.at for a in found] == pytest.approx([0, 0.052, 20576.02004], abs=1e-6)


def test_azure_of_2024_has_a_zone(tmp_path: Path) -> None:
    rows = b"2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.509930+00:00,2399,6"
    found = list(traces.read(written(tmp_path, HEADER + rows)))
    assert [(round(a.at, 6), a.prompt) for a in found] == [(0.0, 2162), (0.5, 2399)]


def test_mooncake(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 6, "hash_ids": [0, 1, 2]},
        {"timestamp": 1250, "input_length": 512, "output_length": 1, "hash_ids": [0], "more": "is let be"},
        {"timestamp": 1250, "input_length": 3, "output_length": 2},
    ]
    found = list(traces.read(written(tmp_path, "\n".join(map(json.dumps, rows)).encode())))
    assert found == [Arrival(0.0, 1100, 6, (0, 1, 2)), Arrival(0.25, 512, 1, (0,)), Arrival(0.25, 3, 2)]


GOOD = b'{"timestamp": 5, "input_length": 600, "output_length": 6, "hash_ids": [1, 2]}\n'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (HEADER, "has a header and no request"),
        (b"timestamp,in,out\n", "line 1: neither format of traces begins so: 'timestamp,in,out'"),
        (b"\xff\xfe", "line 1: not UTF-8"),
        (HEADER + b"2023-11-16 18:17:03,1\n", "line 2: 2 fields, must be 3"),
        (
            HEADER + b"\n2023-11-16 18:17:03,1,1\n2023-13-16 18:17:03,1,1\n",
            "line 4: TIMESTAMP is '2023-13-16 18:17:03'",
        ),
        (HEADER + b"now,1,1\n", "line 2: TIMESTAMP is 'now'"),
        (HEADER + b"2023-11-16 18:17:03,-1,1\n", "line 2: ContextTokens is '-1', must be a whole number"),
        (HEADER + b"2023-11-16 18:17:03,1,0\n", "line 2: GeneratedTokens is 0, must be from 1"),
        (HEADER + b"2023-11-16 18:17:03,1,999999999\n", "line 2: GeneratedTokens is 999999999"),
        (HEADER + b"2023-11-16 18:17:03,1,\xd9\xa3\n", "GeneratedTokens is '\u0663'"),
        (HEADER + b"2023-11-16 18:17:03,1,1\n2023-11-16 18:17:02,1,1\n", "line 3: the request comes before the one"),
        (GOOD + b"[1]\n", "line 2: must be a JSON object"),
        (GOOD + b"{\n", "line 2: not valid JSON"),
        (GOOD + b'{"a":' * 100_000, "line 2: not valid JSON"),
        (GOOD + b'{"timestamp": 6}\n', "line 2: input_length is missing"),
        (GOOD.replace(b" 5", b" 5.5"), "line 1: timestamp is '5.5', must be a whole number"),
        (GOOD.replace(b" 5", b" -5"), "line 1: timestamp is -5"),
        (GOOD.replace(b" 5", b" 1" + b"0" * 30), "line 1: timestamp is 1000"),
        (GOOD.replace(b" 5", b" " + b"9" * 5000), "line 1: not valid JSON"),
        (GOOD.replace(b"600", b"true"), "line 1: input_length is 'true'"),
        (GOOD.replace(b"600", b"0"), "line 1: input_length is 0, must be from 1"),
        (GOOD.replace(b": 6,", b': "6",'), "line 1: output_length is '\"6\"'"),
        (GOOD.replace(b"600", b"512"), "line 1: hash_ids names 2 blocks of 512 tokens, input_length is 512"),
        (GOOD.replace(b"[1, 2]", b"[1, -2]"), "line 1: hash_ids must be a list"),
        (GOOD.replace(b"[1, 2]", b"[1, true]"), "line 1: hash_ids must be a list"),
        (GOOD.replace(b"[1, 2]", b"{}"), "line 1: hash_ids must be a list"),
        (GOOD + b'{"x": "' + b"x" * (2 << 20), "line 2: longer than 1048576 bytes"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        list(traces.read(written(tmp_path, data)))
    assert message in caught.value.message
    assert len(caught.value.message) < 300 + len(str(tmp_path))


def test_a_trace_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be read"):
            list(traces.read(path))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"", HEADER, GOOD]), st.binary(max_size=200), st.integers(0, 80))
def test_no_bytes_do_more_than_be_refused(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, noise: bytes, at: int
) -> None:
    path = tmp_path_factory.mktemp("noise") / "trace"
    path.write_bytes(start + GOOD[:at] + noise + GOOD[at:])
    try:
        for arrival in traces.read(path):
            assert arrival.at >= 0
            assert arrival.prompt >= 1
            assert arrival.new >= 1
    except InputError:
        pass


def test_the_real_azure_trace() -> None:
    path = need_shared_data("traces", "azure_llm_2023", "AzureLLMInferenceTrace_code.csv")
    found = list(traces.read(path))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(found) == 8819
    assert [a.prompt for a in found] == [int(row["ContextTokens"]) for row in rows]
    assert [a.new for a in found] == [int(row["GeneratedTokens"]) for row in rows]
    times = [datetime.fromisoformat(row["TIMESTAMP"]) for row in rows]
    assert [a.at for a in found] == pytest.approx([(t - times[0]).total_seconds() for t in times], abs=3e-6)


def test_the_real_mooncake_trace() -> None:
    path = need_shared_data("traces", "mooncake_fast25", "synthetic_trace.jsonl")
    found = list(traces.read(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [
        Arrival(row["timestamp"] / 1e3, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
        for row in rows
    ]
    assert found == expected
    assert len(found) == 3993
