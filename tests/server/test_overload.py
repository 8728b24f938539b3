"""Four times what the server can do, for a while: each request is answered or refused, and nothing grows.

HASTEN_OVERLOAD_SECONDS=120 makes it as long as its figures in docs/load.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
from server.test_process import process

SECONDS = float(os.environ.get("HASTEN_OVERLOAD_SECONDS", "8"))
TIMES = 4
FLAT = 1.03
LOAD = ("--prompt", "16:64", "--new", "16", "--ids", "10:1000", "--json")


def bench(url: str, *flags: str) -> dict[str, Any]:
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "hasten", "bench-serve", url, *LOAD, *flags]
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=SECONDS + 100)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def metrics(url: str) -> dict[str, float]:
    lines = [line for line in httpx.get(url + "/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_overload() -> None:
    with process("--max-batch", "4", "--max-queue", "12", "--context", "256") as (server, url):
        capacity = bench(url, "--clients", "8", "--duration", "2")["rates"]["requests_per_second"]
        over, memory, health = Event(), [], []

        def watch() -> None:
            with httpx.Client(timeout=10) as client:
                while not over.is_set():
                    memory.append((time.monotonic(), resident(server.pid)))
                    health.append(client.get(url + "/health").status_code)
                    over.wait(0.1)

        watcher = Thread(target=watch)
        watcher.start()
        try:
            found = bench(url, "--rate", f"{TIMES * capacity:g}", "--duration", f"{SECONDS:g}")
        finally:
            over.set()
            watcher.join()
        requests = found["requests"]
        print(f"capacity {capacity:.1f}/s;", requests, found["errors"], f"{len(health)} times healthy")
        assert requests["completed"] + requests["refused"] == requests["sent"], found["errors"]
        assert requests["refused"] > requests["sent"] / 4, "this was no overload"
        assert requests["completed"] > 0.4 * capacity * SECONDS, "it does less under load than before"
        assert all(e["with_retry_after"] == e["count"] for e in found["errors"]), "a 429 says when to come back"
        assert set(health) == {200}
        begun = memory[0][0]
        early = [size for at, size in memory if SECONDS / 4 < at - begun < SECONDS / 2]
        late = [size for at, size in memory if at - begun > SECONDS * 0.75]
        print(f"resident {min(early) / 2**20:.1f} to {max(late) / 2**20:.1f} MiB")
        assert max(late) < FLAT * max(early), "memory grows"
        after = metrics(url)
        for name in ("hasten_requests_running", "hasten_requests_waiting", "hasten_kv_cache_usage_ratio"):
            assert after[name] == 0, name
        assert server.poll() is None
