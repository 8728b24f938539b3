"""lm-evaluation-harness' own code against the server: its log-likelihoods are those of `hasten eval`, to the bit."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server.serving import Server, eventually, serve

from hasten import LLM, checkpoint
from hasten.evaluate import perplexity

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed (pip install 'lm_eval[api]')", allow_module_level=True)

HERE = Path(__file__).parent / "lm_eval_task"
CONTEXT = 48  # the longer texts are scored in several windows, which fill it but for the one new token


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(LLM("demo", context=CONTEXT, max_batch=4, threads=1, score_rows=32)) as running:
        yield running
        eventually(running.idle)
        assert running.service.stats.faults == 0


def harness(server: Server, concurrent: int, out: Path) -> dict[str, Any]:
    tokenizer = str(checkpoint.open("demo").path)
    command = [sys.executable, str(HERE / "run.py"), server.url, tokenizer, str(CONTEXT), str(concurrent), str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out.parent / "hf")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("concurrent", [1, 4])
def test_local_completions_scores_as_hasten_eval(server: Server, tmp_path: Path, concurrent: int) -> None:
    found = harness(server, concurrent, tmp_path / "found.json")
    asked, results = found["asked"], found["results"]
    model = checkpoint.open("demo").at_context(CONTEXT)
    windows = [np.array(context + continuation, np.int32) for context, continuation, *_ in asked]
    scores = perplexity.measure(model.graph, model.weights(), windows, threads=1).logprobs

    assert sum(len(context) > 1 for context, *_ in asked) >= 15  # choices
    assert len(asked) > 18  # and more windows than texts
    likelihoods = []
    for (context, continuation, value, _), row in zip(asked, scores, strict=True):
        own = row[len(context) - 1 :].tolist()
        assert len(own) == len(continuation)
        assert value == sum(own)
        likelihoods.append(value)

    choices = [json.loads(line) for line in (HERE / "choice.jsonl").read_text().splitlines()]
    right, at = 0, 0
    for choice in choices:
        count = len(choice["choices"])
        right += int(np.argmax(likelihoods[at : at + count])) == choice["answer"]
        at += count
    assert results["hasten_choice"]["acc,none"] == right / len(choices)
    texts = [json.loads(line)["text"] for line in (HERE / "rolling.jsonl").read_text().splitlines()]
    mean = -sum(likelihoods[at:]) / sum(len(t.encode()) for t in texts)
    assert results["hasten_rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(mean), rel=1e-12)
    assert 1 < math.exp(mean) < 20
