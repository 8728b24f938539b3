from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from hasten.bench import against, contenders
from hasten.bench.peers import PeerError
from hasten.cli.main import main

MACHINE = {"memory_read_gbs", "int8_gmacs", "bf16_gmacs", "cores", "instruction_set"}
MODEL = {"parameters", "bits_per_weight"}
RUN = {
    "batch",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "decode_tokens_per_second_per_parameter",
    "ttft_ms",
    "prefill_share_of_limit",
    "decode_share_of_limit",
    "ttft_share_of_limit",
}
SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QUICK = ["--prompt", "9", "--new", "3", "--batch", "1,3", "--rounds", "1"]


@pytest.fixture
def shape(tmp_path: Path) -> str:
    """A directory that holds only a config.json."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path)


def test_json(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", shape, *QUICK, "--random-weights", "--format", "int8-g32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["machine"]) >= MACHINE
    assert set(found["model"]) >= MODEL
    assert [run["batch"] for run in found["runs"]] == [1, 3]
    for run in found["runs"]:
        assert set(run) >= RUN
        rate = run["decode_tokens_per_second"]
        assert run["decode_tokens_per_second_per_parameter"] == pytest.approx(rate / found["model"]["parameters"])
    assert found["model"]["bits_per_weight"] == pytest.approx(8.5)  # a code, and an f16 scale for each 32
    assert set(found["model"]["formats"]) == {"int8-g32"}
    assert found["memory"]["peak_resident"] > found["memory"]["weights"] > 0


def test_table_and_plot(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "speeds.svg"
    assert main(["bench", shape, *QUICK, "--random-weights", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{shape}: ")
    assert [line.split()[0] for line in lines if line[:5].strip().isdigit()] == ["1", "3"]
    titles = [element.text for element in ElementTree.parse(plot).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 8  # two charts of two series at two batch sizes
    assert sum("limit" in (title or "") for title in titles) == 4


def no_install(peer: Any, home: Any) -> dict[str, Any]:
    raise PeerError("no such wheel")


def test_beside_peers_that_cannot_be_installed(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contenders, "install", no_install)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(against, "LEAST_SECONDS", 0.0)
    out = tmp_path / "out"
    flags = ["--against", "openvino,llama.cpp", "--random-weights", "--format", "int8-g32,int4-g32", "--rounds", "2"]
    flags += ["--workloads", "prefill-9,decode-3,depth-200,depth-4096", "--threads", "1", "--output", str(out)]
    assert main(["bench", shape, *flags, "--json"]) == 2  # nothing was compared
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "no peer could be measured" in shown.err
    assert str(tmp_path / "cache") in shown.err  # where the copies of the weights stay
    assert found == json.loads((out / "report.json").read_text())
    assert found["missing"] == [
        {"peer": name, "reason": "not installed: no such wheel"} for name in ("openvino", "llama.cpp")
    ]
    assert found["left_out"] == ["depth-4096"]
    assert [w["name"] for w in found["workloads"]] == ["prefill-9", "decode-3", "depth-200"]
    for workload in found["workloads"]:
        assert set(workload["engines"]) == {"hasten int8-g32", "hasten int4-g32"}
        assert all(len(figures["seconds"]) == 2 for figures in workload["engines"].values())
    bytes_read = {name: engine["step_bytes"] for name, engine in found["engines"].items()}
    assert bytes_read["hasten int4-g32"] < 0.6 * bytes_read["hasten int8-g32"]
    assert (out / "report.svg").read_text().startswith("<svg")
    assert "not installed: no such wheel" in (out / "report.md").read_text()

    measured = (out / "partial.json").read_bytes()
    assert main(["bench", shape, *flags, "--discard"]) == 2  # nothing is measured twice
    assert (out / "partial.json").read_bytes() == measured
    assert "no such wheel" in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob("hasten/inputs/*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workloads", "decode-1"], "--workloads goes with --against"),
        (["--discard"], "--discard goes with --against"),
        (["--against", "vllm"], "no such peer: vllm"),
        (["--against", "openvino", "--workloads", "all"], "no such workload: all"),
        (["--against", "openvino", "--format", "int9"], "unknown weight format 'int9'"),
        (["--against", "openvino", "--random-weights"], "needs --format"),
        (["--against", "openvino", "--plot", "a.svg"], "--plot goes without --against"),
        (["--against", "openvino", "--batch", "2"], "--batch goes without --against"),
        (["--against", "openvino", "--rounds", "0"], "--rounds must be at least 1"),
        (
            ["--against", "openvino", "--random-weights", "--format", "int4-g32", "--workloads", "prefill-512"],
            "context of 256 tokens holds none",
        ),
        (["--format", "int8-g32"], "--format goes with --random-weights"),
        (["--random-weights", "--format", "int9"], "unknown weight format 'int9'"),
        (["--random-weights", "--batch", "0"], "batch is 0"),
        (["--random-weights", "--prompt", "99999"], "the model's context is"),
        (["--random-weights", "--rounds", "0"], "rounds is 0"),
        (["--random-weights", "--plot", "no/such/folder/a.svg"], "is no directory"),
        ([], "error: "),  # no weights in that directory
    ],
)
def test_wrong_use_is_one_clear_error(
    shape: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [] if "--against" in arguments else ["--new", "2", "--prompt", "4"]
    assert main(["bench", shape, *small, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.startswith("error: ")
