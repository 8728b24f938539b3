"""Servers under load: the same prompts for each in a round, a process that is ended, and reasons where it fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hasten.bench import servers, workloads
from hasten.bench.contenders import _serve
from hasten.bench.load.arrivals import Schedule
from hasten.bench.peers.common import PeerError, Runner, Workload
from hasten.bench.vocabulary import END, write_tokenizer
from hasten.checkpoint import Tokenizer
from hasten.checkpoint.gguf.vocabulary import vocabulary

SMALL = Workload("serve-2", "serve", tokens=140, batch=2, new=4)
# Answers to whatever comes as a server that streams two tokens for each that was asked for would.
PEER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.reply("application/json", json.dumps({"data": [{"id": "m"}]}).encode())
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        sys.stdout.write(json.dumps(asked["prompt"]) + "\\n")  # one write: threads print at once
        sys.stdout.flush()
        if len(sys.argv) > 2 and sys.argv[2] == "refuses":
            self.send_error(500)
            return
        part = {"choices": [{"index": 0, "text": "x", "finish_reason": None}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": asked["max_tokens"]}}
        lines = [json.dumps(part)] * asked["max_tokens"] + [json.dumps(usage), "[DONE]"]
        self.reply("text/event-stream", b"".join(b"data: " + line.encode() + b"\\n\\n" for line in lines))
    def reply(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def quiet(stage: str, done: int, total: int) -> None:
    pass


def asked(log: Path, skip: int = 1) -> list[Any]:
    """The prompts that a server was sent, its warm-up left out, in no order."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("[")]
    return sorted(json.loads(line) for line in lines[skip:])


def started(log: Path, *arguments: str) -> servers.Server:
    return servers.Server([sys.executable, "-c", PEER, "{port}", *arguments], {}, log, quiet)


def test_servers_get_the_same_prompts_in_a_round_and_others_in_the_next(tmp_path: Path) -> None:
    logs = []
    for number in range(2):
        log = tmp_path / str(number)
        server = started(log)
        try:
            found = server.measure(SMALL, turn=3)
        finally:
            server.close()
        assert found["seconds"] > 0
        assert found["latency_ms"]["itl"]["count"] == servers.requests(SMALL) * (SMALL.new - 1)
        logs.append(asked(log))
    assert logs[0] == logs[1]
    assert len(logs[0]) == servers.requests(SMALL)
    assert all(servers.SHORTEST <= len(prompt) <= SMALL.tokens for prompt in logs[0])
    texts = servers.prompts(servers.load(SMALL, 4))
    later = [[int(p) for p in texts.pieces(a, n)] for n, a in enumerate(Schedule(servers.load(SMALL, 4)))]
    assert not {tuple(p) for p in later} & {tuple(p) for p in logs[0]}


def test_answers_that_fail_are_no_figure(tmp_path: Path) -> None:
    server = started(tmp_path / "log", "refuses")
    try:
        with pytest.raises(PeerError, match="500"):
            server.measure(SMALL, turn=0)
    finally:
        server.close()


def test_a_server_that_ends_says_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('error: no such model')"]
    with pytest.raises(PeerError, match="status 1: error: no such model"):
        servers.Server(command, {}, tmp_path / "log", quiet)


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="fastapi is not installed")
def test_hastens_own_server_and_its_engine_alone(tmp_path: Path) -> None:
    load = {"threads": 1, "kv_format": "auto"}
    here = {"PYTHONPATH": ":".join(sys.path)}
    server = servers.Server(_serve(Path("demo"), load, SMALL, {}), here, tmp_path / "log", quiet)
    try:
        served = server.measure(SMALL, turn=1)
    finally:
        server.close()
    runner = Runner(sys.executable, "run_hasten.py", tmp_path / "runner", here, quiet)
    try:
        runner.call("load", path="demo", threads=1, context=256, tokens=512, batch=2)
        alone = runner.call("alone", workload=vars(SMALL), turn=1)
    finally:
        runner.close()
    assert 0 < alone["seconds"] < 10 * served["seconds"]


def test_workloads_of_servers_have_names() -> None:
    assert workloads.parse("serve-8") == Workload("serve-8", "serve", tokens=512, batch=8, new=64)


@pytest.mark.parametrize("size", [300, 5000])
def test_a_made_tokenizer_has_as_many_tokens_as_asked_for(tmp_path: Path, size: int) -> None:
    write_tokenizer(tmp_path, size)
    tokenizer = Tokenizer(tmp_path, size)
    assert tokenizer.vocabulary_size == size
    assert tokenizer.eos_token_id == size - 1
    for text in ("Some words, 12 of them.", "ä 中 😀"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    said = vocabulary(tmp_path, size)
    assert said["tokenizer.ggml.model"] == "gpt2", "llama.cpp can read it"
    assert said["tokenizer.ggml.eos_token_id"] == size - 1
    assert isinstance(said["tokenizer.ggml.tokens"], list)
    assert said["tokenizer.ggml.tokens"][-1] == END
