"""One model for the whole folder, once to serve and once to compare with. Without the server's libraries all skip."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from hasten import LLM

if TYPE_CHECKING:
    from server.serving import Server

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> str:
    return f"tests/server are left out: {', '.join(MISSING)} not installed" if MISSING else ""


@pytest.fixture(scope="session")
def reference() -> LLM:
    """What served answers are compared with; its cache is its own."""
    return LLM("demo", context=512, threads=1)


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM("demo", context=512, max_batch=4, threads=1, score_rows=32)


@pytest.fixture
def server(llm: LLM) -> Iterator[Server]:
    from server.serving import serve

    with serve(llm) as running:
        yield running
        assert running.service.stats.faults == 0
