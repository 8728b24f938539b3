"""`hasten serve` as its users start it: a process, its flags, its signals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread

import httpx
import pytest

from hasten.cli.main import main
from hasten.cli.serve import names

LONG = {"prompt": "def read", "max_tokens": 400, "ignore_eos": True, "n": 8, "seed": 1}


@contextmanager
def process(
    *flags: str, log: list[str] | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, URL) of a server of the embedded model on a free port; what it says once it serves goes to `log`."""
    log = [] if log is None else log
    command = [sys.executable, "-m", "hasten", "serve", "demo", "--port", "0", "--threads", "1", *flags]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=here) as started:
        assert started.stderr
        try:
            lines = []
            for line in started.stderr:
                lines.append(line)
                if found := re.search(r"serving \S+ at (http://\S+)", line):
                    break
            else:
                pytest.fail("".join(lines))
            Thread(target=log.extend, args=(started.stderr,), daemon=True).start()
            yield started, found[1]
        finally:
            started.kill()
            started.wait()


def begin(url: str) -> tuple[httpx.Client, httpx.Response, Iterator[str]]:
    """A long stream whose first event is there."""
    client = httpx.Client(timeout=60)
    answer = client.send(
        client.build_request("POST", url + "/v1/completions", json={**LONG, "stream": True}), stream=True
    )
    lines = answer.iter_lines()
    assert next(lines).startswith("data: {")
    return client, answer, lines


def test_the_first_signal_lets_what_runs_end() -> None:
    with process() as (server, url):
        assert httpx.get(url + "/health").json()["status"] == "serving"
        client, answer, lines = begin(url)
        with closing(client), closing(answer):
            server.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/health")
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        finished = [json.loads(e[6:])["choices"][0]["finish_reason"] for e in events[:-1]]
        assert finished.count("length") == 8
        assert server.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_ends_at_once(number: signal.Signals) -> None:
    with process() as (server, url):
        client, answer, _ = begin(url)
        with closing(client), closing(answer):
            server.send_signal(number)
            time.sleep(0.3)
            assert server.poll() is None, "it did not wait for what was running"
            server.send_signal(number)
            assert server.wait(2) == 128 + number


def test_draining_has_a_deadline() -> None:
    log: list[str] = []
    with process("--drain-seconds", "1", log=log) as (server, url), ThreadPoolExecutor(1) as pool:
        client, answer, lines = begin(url)
        with closing(client), closing(answer):
            whole = pool.submit(httpx.post, url + "/v1/completions", json=LONG, timeout=60)
            time.sleep(0.2)
            started = time.monotonic()
            server.send_signal(signal.SIGTERM)
            told = [line.removeprefix("data: ") for line in lines if line]
            assert server.wait(10) == 0
            assert 0.5 < time.monotonic() - started < 8
        assert told[-1] == "[DONE]"
        assert json.loads(told[-2])["error"]["code"] == "unavailable"
        refused = whole.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert any("did not end within 1 s" in line for line in log)
    assert not any("Traceback" in line for line in log)


def test_keys_come_from_the_environment_and_the_name_from_a_flag() -> None:
    with process("--name", "mine", HASTEN_API_KEY="one,two") as (_, url):
        assert httpx.get(url + "/v1/models").status_code == 401
        for key in ("one", "two"):
            models = httpx.get(url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"]
            assert [m["id"] for m in models] == ["mine", "demo"]


def test_refusals_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "demo", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1:" in capsys.readouterr().err
    for flags, words in (
        (["--port", "99999"], "port is 99999, must be between 0 and 65535"),
        (["--max-queue", "-1"], "max_queue is -1"),
        (["--drain-seconds", "nan"], "drain_seconds is nan"),
        (["--api-key", "schlüssel"], "must be plain ASCII"),
        (["--context", "9999999"], "a context of 9999999 tokens is more than the model's"),
    ):
        assert main(["serve", "demo", *flags]) == 2
        assert words in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert main(["serve", "demo"]) == 2
    assert capsys.readouterr().err == "error: hasten serve needs uvicorn\nhint: pip install 'hasten[serve]'\n"


def test_help_loads_none_of_the_server() -> None:
    code = "import sys; from hasten.cli.main import main; main(['serve', '--help']); print(sorted(sys.modules))"
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here, check=True).stdout
    assert "--drain-seconds" in shown
    assert not re.search(r"'(fastapi|uvicorn|numpy|asyncio|prometheus_client)'", shown)


def test_a_folder_is_called_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fast").mkdir()
    monkeypatch.chdir(tmp_path)
    assert names("fast/", None) == ("fast", "fast/")
    assert names("fast/", "mine") == ("mine", "fast", "fast/")
    assert names("org/model", None) == ("org/model",)
