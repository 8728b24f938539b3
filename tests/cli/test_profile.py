from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import small_model
from cli.test_bench import SHAPE

from hasten.cli.main import main

QUICK = ["--prompt", "9", "--new", "3", "--batch", "2", "--rounds", "2", "--threads", "2"]
RANDOM = ["--random-weights", "--format", "int8-g32"]
ROW = {"label", "kind", "seconds", "share_of_time", "waiting", "bytes", "int_macs", "float_macs", "limit_seconds"}
PLAN = 1 + 2 * 5 + 2  # embed; five regions a block; wanted rows and head


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A directory that holds only a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path)


def test_json(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", shape, *QUICK, *RANDOM, "--json", "--each"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["machine"]) >= {"memory_read_gbs", "int8_gmacs", "bf16_gmacs", "instruction_set"}
    assert set(found["model"]["formats"]) == {"int8-g32"}
    for name, passes in (("prefill", 2), ("decode", 2 * 3)):
        phase = found[name]
        assert phase["passes"] == passes
        for rows in (phase["rows"], phase["each"]):
            assert all(set(row) >= ROW for row in rows)
            assert sum(row["seconds"] for row in rows) + phase["unaccounted_seconds"] == pytest.approx(phase["seconds"])
            assert sum(row["regions"] for row in rows) == PLAN
            assert sum(row["limit_seconds"] for row in rows) == pytest.approx(phase["limit_seconds"])
        assert phase["share_of_limit"] == pytest.approx(phase["limit_seconds"] / phase["seconds"])
        down = [row for row in phase["each"] if row["kind"].startswith("down")]
        tokens = 2 * 9 if name == "prefill" else 2
        assert [row["block"] for row in down] == [0, 1]
        assert [row["int_macs"] for row in down] == [tokens * 96 * 64] * 2


def test_table(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", shape, *QUICK, *RANDOM]) == 0
    shown = capsys.readouterr().out
    _, prefill, decode = re.split(r"\n(?=prefill of|a step of)", shown)
    for text in (prefill, decode):
        lines = text.split("\n\n")[0].splitlines()
        assert lines[1].split()[:2] == ["region", "count"]
        regions = {line.split("  ")[0]: line for line in lines[2:]}
        assert "gate,up linear + norm + silu gate [64 -> 192] int8-g32" in regions
        counted = [int(line[len(words) :].split()[0]) for words, line in regions.items() if "linear" in words]
        assert counted == [2, 2, 2, 2, 1]
        width = lines[1].index("count") + len("count")
        timed = [line for line in lines[2:] if line[width : width + 11].strip()]
        times = [float(line[width : width + 11]) for line in timed]
        assert sum(times[:-1]) == pytest.approx(times[-1], abs=0.0005 * len(times) + 0.001)
        assert timed[-1].startswith("total")
        assert timed[-2].startswith("unaccounted")


def test_each_region_has_a_line(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", shape, *QUICK, *RANDOM, "--each"]) == 0
    shown = capsys.readouterr().out
    for block in (0, 1):
        assert shown.count(f"\nblock {block}: q,k,v linear + norm + quantise [64 -> 128] int8-g32") == 2


def test_a_trace_is_written(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert main(["profile", shape, *QUICK, *RANDOM, "--trace", str(trace)]) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    caller = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert sum(e["cat"] == "step" for e in caller) == 1 + 3
    assert sum(e["cat"] == "region" for e in caller) == (1 + PLAN) * (1 + 3)


@pytest.mark.parametrize("source", ["directory", "artifact", "demo"])
def test_models_of_every_kind(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "demo" if source == "demo" else str(small_model.write(tmp_path / "model"))
    if source == "artifact":
        (tmp_path / "recipe.yaml").write_text("tensors:\n  - match: '*'\n    format: int4-g32\n")
        out = str(tmp_path / "artifact")
        assert main(["compress", model, "-o", out, "--recipe", str(tmp_path / "recipe.yaml")]) == 0
        model = out
    capsys.readouterr()
    assert main(["profile", model, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decode"]["seconds"] > 0
    assert ("int4-g32" in found["model"]["formats"]) == (source == "artifact")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "int8-g32"], "--format goes with --random-weights"),
        (["--random-weights", "--format", "int9"], "unknown weight format 'int9'"),
        (["--random-weights", "--batch", "0"], "batch is 0"),
        (["--random-weights", "--new", "0"], "new is 0"),
        (["--random-weights", "--prompt", "99999"], "the model's context is"),
        (["--random-weights", "--rounds", "0"], "rounds is 0"),
        (["--random-weights", "--trace", "no/such/folder/a.json"], "is no directory"),
        ([], "error: "),  # no weights in that directory
    ],
)
def test_wrong_use_is_one_clear_error(
    shape: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", shape, "--new", "2", "--prompt", "4", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.startswith("error: ")
