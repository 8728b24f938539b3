"""`hasten bench-serve` from its entry point: table, JSON, files, exit status, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from bench.load_server import HEAD, Reply, serving, well

from hasten.cli.main import main

Captured = pytest.CaptureFixture[str]
SMALL = ["--prompt", "4:9", "--new", "3"]


def found(arguments: list[str], capsys: Captured, status: int = 0) -> dict[str, Any]:
    assert main(["bench-serve", *arguments, "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def fails(arguments: list[str], capsys: Captured) -> str:
    assert main(["bench-serve", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    return shown.err


def test_files_of_a_load(tmp_path: Path, capsys: Captured) -> None:
    async def answer(reply: Reply) -> None:
        if len(server.seen) % 4 == 0:
            await reply.status(429, b'{"error": {"message": "<b>full</b> | *now* \\u001b[31m"}}', Retry_After="1")
        else:
            await well(reply, 0.01, 0.002)

    out = tmp_path / "new" / "folder"
    with serving(answer) as server:
        arguments = [server.url, "--rate", "100", "--limit-requests", "20", "--slo", "ttft=5s,tpot=2s", *SMALL]
        document = found([*arguments, "--output", str(out)], capsys)
    assert sorted(p.name for p in out.iterdir()) == ["report.json", "report.md", "report.svg", "requests.jsonl"]
    assert json.loads((out / "report.json").read_text()) == document
    assert document["target"] == {"url": f"{server.url}/v1", "endpoint": "/completions", "model": "m"}
    assert document["requests"]["completed"] == document["goodput"]["good"] == 15
    assert document["errors"][0]["with_retry_after"] == 5

    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert sorted(line["request"] for line in lines) == list(range(20))
    for line in lines:
        if line["outcome"] == "completed":
            assert len(line["chunks"]) == line["output_tokens"] == 3
            assert line["ttft"] == pytest.approx(line["chunks"][0] - line["started"], abs=1e-5)
            assert line["scheduled"] <= line["started"] <= line["connected"] <= line["chunks"][0] <= line["finished"]
        else:
            assert (line["outcome"], line["status"], line["error"]) == ("refused", 429, "HTTP 429")

    page = (out / "report.md").read_text()
    assert "15 completed, 5 refused" in page
    assert r"\<b\>full\</b\> \| \*now\*" in page
    assert "<b>" not in page
    assert "\x1b" not in page
    drawing = ElementTree.fromstring((out / "report.svg").read_text())
    titles = {t.get("aria-label") for t in drawing.iter() if t.get("aria-label")}
    assert {t.split(",")[0] for t in titles if t} == {"Latencies", "Over time", "Requests under way"}


def test_the_table(capsys: Captured) -> None:
    with serving() as server:
        assert main(["bench-serve", server.url, "--clients", "2", "--limit-requests", "6", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert f"{server.url}/v1/completions, model m: closed loop of 2 clients, prompts of 4 to 9 tokens, 3 new" in shown
    assert "6 requests sent in" in shown
    assert "6 completed, 0 refused, 0 failed, 0 unfinished" in shown
    for name in ("time to first token", "time per output token", "inter-token latency", "end to end"):
        assert re.search(rf"^{name}, ms( +[\d.,]+){{5}}$", shown, re.M)
    assert shown.isprintable() or "\x1b" not in shown


def test_prompts_that_were_cached_are_no_new_ones(capsys: Captured) -> None:
    async def answer(reply: Reply) -> None:
        await reply.raw(HEAD)
        await reply.text()
        size = len(reply.seen.body["prompt"])
        await reply.usage(size, 1, prompt_tokens_details={"cached_tokens": size // 2})
        await reply.done()

    with serving(answer) as server:
        assert (
            main(
                ["bench-serve", server.url, "--clients", "1", "--limit-requests", "2", "--prompt", "8:8", "--new", "1"]
            )
            == 0
        )
    shown = capsys.readouterr().out
    assert "50% of the prompts' tokens came from a cache" in shown
    assert "--seed" in shown


def test_a_model_s_name_is_text(tmp_path: Path, capsys: Captured) -> None:
    name = "<script>alert(1)</script>&\x1b[2J\x00"
    with serving() as server:
        arguments = [server.url, "--model", name, "--clients", "1", "--limit-requests", "1", *SMALL]
        assert main(["bench-serve", *arguments, "--output", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert server.seen[-1].body["model"] == name
    ElementTree.fromstring((tmp_path / "report.svg").read_text())
    assert "<script" not in (tmp_path / "report.svg").read_text()


def test_a_trace_is_played(tmp_path: Path, capsys: Captured) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 10, "hash_ids": [1, 2]},
        {"timestamp": 2000, "input_length": 1000, "output_length": 20, "hash_ids": [1, 3]},
        {"timestamp": 3000, "input_length": 9000, "output_length": 20, "hash_ids": [1, 3]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    with serving() as server:
        flags = ["--trace", str(trace), "--time-scale", "0.1", "--length-scale", "0.1", "--context", "500"]
        document = found([server.url, *flags], capsys)
    (first, second) = [s for s in server.seen if s.method == "POST"]
    assert second.at - first.at == pytest.approx(0.2, abs=0.15)
    assert [len(s.body["prompt"]) for s in (first, second)] == [100, 100]
    assert [s.body["max_tokens"] for s in (first, second)] == [1, 2]
    assert first.body["prompt"][:51] == second.body["prompt"][:51]
    assert first.body["prompt"][51:] != second.body["prompt"][51:]
    assert document["load"]["left_out"] == 1
    assert document["load"]["kind"] == "a trace's arrivals, times x 0.1"


def test_chat_with_a_key_and_fields_of_one_s_own(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("MY_KEY", "sk-1")
    with serving() as server:
        flags = [
            "--chat",
            "--api-key-env",
            "MY_KEY",
            "--extra",
            '{"cache_salt": "me"}',
            "--standard-fields",
            "--no-usage",
        ]
        document = found([server.url, "--clients", "1", "--limit-requests", "2", *flags, *SMALL], capsys)
    assert document["requests"]["completed"] == 2
    assert "sk-1" not in json.dumps(document)
    asked = [s for s in server.seen if s.method == "POST"]
    assert {s.path for s in asked} == {"/v1/chat/completions"}
    assert {s.headers["authorization"] for s in server.seen} == {"Bearer sk-1"}
    assert asked[0].body["cache_salt"] == "me"
    assert not asked[0].body.keys() & {"ignore_eos", "min_tokens", "stream_options", "prompt"}


def test_words_of_a_tokenizer(capsys: Captured) -> None:
    demo = Path(__file__).resolve().parents[2] / "src/hasten/demo"
    if not (demo / "tokenizer.json").exists():
        pytest.skip("the demo model is not here")
    from hasten.checkpoint.tokenizer import Tokenizer

    with serving() as server:
        flags = ["--text", "--tokenizer", str(demo), "--prompt", "50", "--new", "2"]
        found([server.url, "--clients", "1", "--limit-requests", "4", *flags], capsys)
    tokenizer = Tokenizer(demo)
    lengths = [len(tokenizer.encode(s.body["prompt"], special=False)) for s in server.seen if s.method == "POST"]
    assert len(lengths) == 4
    assert all(abs(length - 50) <= 1 for length in lengths)


def test_no_answer_is_status_1(capsys: Captured) -> None:
    async def answer(reply: Reply) -> None:
        await reply.status(500)

    with serving(answer) as server:
        document = found([server.url, "--rate", "100", "--limit-requests", "3", *SMALL], capsys, status=1)
    assert document["requests"]["failed"] == 3
    assert document["latency_ms"]["ttft"] is None
    assert main(["bench-serve", "http://127.0.0.1:1", "--rate", "1", "--limit-requests", "1"]) == 2
    assert "nothing answers at http://127.0.0.1:1/v1" in capsys.readouterr().err


LOAD = ["http://127.0.0.1:1", "--clients", "1", "--limit-requests", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://h"], "nothing says when requests come"),
        ([*LOAD, "--prompt", "9:4"], "a prompt of 9:4 tokens"),
        ([*LOAD, "--prompt", "many"], "--prompt is 'many', must be LOW:HIGH"),
        ([*LOAD, "--trace", "x", "--new", "5"], "--new goes without --trace"),
        ([*LOAD, "--trace", "/none/there"], "/none/there cannot be read"),
        ([*LOAD, "--ids", "5:5"], "--ids is 5:5"),
        ([*LOAD, "--chat", "--text"], "--chat and --text are two endpoints"),
        ([*LOAD, "--tokenizer", "x"], "--tokenizer goes with --chat or --text"),
        ([*LOAD, "--text", "--tokenizer", "/none"], "/none/tokenizer.json is missing"),
        ([*LOAD, "--extra", "{"], "--extra is not valid JSON"),
        ([*LOAD, "--slo", "ttft=1"], "--slo 'ttft=1' is no limit"),
        ([*LOAD, "--timeout", "nan"], "--timeout is nan"),
        ([*LOAD, "--warmup", "-1"], "--warmup is -1"),
        ([*LOAD, "--temperature", "-1"], "--temperature is -1.0"),
        ([*LOAD, "--api-key-env", "NO_SUCH_VARIABLE"], "there is no environment variable NO_SUCH_VARIABLE"),
        ([*LOAD, "--output", "/dev/null/x"], "/dev/null/x cannot be made"),
    ],
)
def test_refused_before_anything_is_sent(arguments: list[str], message: str, capsys: Captured) -> None:
    assert message in fails(arguments, capsys)


def test_ctrl_c_shows_what_there_is_so_far(tmp_path: Path) -> None:
    async def answer(reply: Reply) -> None:
        if len(server.seen) > 6:  # the list of models, then five
            process.send_signal(signal.SIGINT)
            await asyncio.sleep(30)
        await well(reply)

    with serving(answer) as server:
        arguments = [
            server.url,
            "--rate",
            "20",
            "--limit-requests",
            "1000",
            "--output",
            str(tmp_path),
            "--json",
            *SMALL,
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "hasten", "bench-serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        out, err = process.communicate(timeout=120)
    assert err == b""
    assert process.returncode == 130
    document = json.loads(out)
    assert document["interrupted"]
    assert document["requests"]["completed"] == 5
    assert document["requests"]["planned"] == 1000
    assert json.loads((tmp_path / "report.json").read_text()) == document
