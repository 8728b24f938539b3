"""Files of requests for tests, and a batch of them run in the test's process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hasten import LLM
from hasten.engine.engine import Engine
from hasten.server.batch import answer
from hasten.server.batch_input import Requests
from hasten.server.batch_output import Results, Summary
from hasten.server.config import Served

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


def request(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, requests: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in requests))
    return path


def read(path: Path) -> list[Any]:
    """Every line of a file of answers; the last one must be whole too."""
    raw = path.read_bytes()
    assert raw.endswith(b"\n")
    return [json.loads(line) for line in raw.splitlines()]


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """Tell nobody."""


def served(llm: LLM) -> Served:
    template = llm.tokenizer.chat_template
    return Served(("demo",), llm.tokenizer, llm.program.limits.context, llm.model.graph.vocabulary, {}, template)


def run(
    llm: LLM,
    path: Path,
    output: Path,
    *,
    make_engine: Callable[[], Engine] | None = None,
    report: Any = silent,
    **facts: Any,
) -> Summary:
    requests = Requests(path, ["demo"])
    with Results(output, requests, facts) as results:
        if results.complete:
            return results.summary(results.count, 0, 0.0)
        return answer(make_engine or llm.make_engine, served(llm), requests, results, report)


def without_company(line: dict[str, Any]) -> dict[str, Any]:
    """An answer without what no two runs share: ids, the clock, and what others had left in the cache."""
    body = dict(line["response"]["body"])
    for name in ("id", "created"):
        body.pop(name, None)
    if "usage" in body:
        body["usage"] = {k: v for k, v in body["usage"].items() if k != "prompt_tokens_details"}
    return {"custom_id": line["custom_id"], "status": line["response"]["status_code"], "body": body}
