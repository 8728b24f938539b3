"""Schemathesis: what the OpenAPI description allows or forbids is answered as it says, and never by 500.

HASTEN_FUZZ_CASES says how many requests there are at least (`make fuzz`). Run with -s for the summary.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from server.serving import Server, eventually, serve

from hasten import LLM
from hasten.server.config import HttpLimits

if importlib.util.find_spec("schemathesis") is None:
    pytest.skip("schemathesis is not installed", allow_module_level=True)

CASES = int(os.environ.get("HASTEN_FUZZ_CASES", "1000"))
BODIES = 4  # routes with bodies, among which the cases are divided; the others have little to vary
COMMAND = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
# A request may be refused for what no schema can say: the context's length, two fields that contradict each other.
OPTIONS = [
    *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--request-timeout", "600"),
    *("--exclude-checks", "positive_data_acceptance"),
]
FIXED = ["--seed", "1", "--generation-database", "none"]
ROUTES = 9


@pytest.fixture
def fuzzed() -> Iterator[Server]:
    small = LLM("demo", context=96, max_batch=8, threads=1, score_rows=32)
    with serve(small, limits=HttpLimits(n=2, prompts=4, messages=20, tools=5, ids=50)) as running:
        yield running
        eventually(running.idle)
        assert running.service.stats.faults == 0


def test_requests_are_answered_as_described(fuzzed: Server) -> None:
    seed = [] if "HASTEN_FUZZ_CASES" in os.environ else FIXED
    drawn = (
        CASES // BODIES if "HASTEN_FUZZ_CASES" in os.environ else CASES // 10
    )  # each field's edges are a thousand more
    arguments = ["run", f"{fuzzed.url}/openapi.json", "--max-examples", str(max(drawn, 1)), *OPTIONS, *seed]
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)
    print(done.stdout)
    seen = dict(fuzzed.app.state.context.answers)
    print(*(f"{status} {count:6} {route}" for (route, status), count in sorted(seen.items())), sep="\n")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert not {status for _, status in seen if status >= 500}
    assert sum(seen.values()) >= CASES
    assert len({route for route, status in seen if status in (200, 400)}) >= ROUTES
