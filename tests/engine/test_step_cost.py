"""What the engine itself costs a step: planning, arrays, bookkeeping, without model and tokenizer."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from hasten.backends.batch import Batch, Limits, Sampled, SamplingBatch
from hasten.engine.engine import Engine
from hasten.engine.request import SamplingParams


class Outputs:
    def sample(self, sampling: SamplingBatch) -> Sampled:
        rows = len(sampling.position)
        none = np.zeros((rows, 0))
        return Sampled(
            np.full(rows, 3, np.int32), np.zeros(rows, np.float32), none.astype(np.int32), none.astype(np.float32)
        )


class Nothing:
    """A program that computes nothing, at once."""

    limits = Limits(context=4096, kv_blocks=16 * 128)

    def step(self, batch: Batch) -> Outputs:
        return Outputs()

    def memory(self) -> dict[str, int]:
        return {}


def reference_microseconds() -> float:
    """CPU time of a fixed piece of plain Python: about 200 where the limits below were set."""
    started = time.process_time_ns()
    table: dict[int, list[int]] = {}
    for i in range(2000):
        table[i & 63] = [i]
        assert table[i & 63][0] == i
    return (time.process_time_ns() - started) / 1000


PLAIN = SamplingParams(max_tokens=2000, ignore_eos=True)
CONSTRAINED = replace(PLAIN, logit_bias={3: 1.0}, allowed_token_ids=[3, 4], stop_token_ids=[5], min_tokens=1000)


@pytest.mark.parametrize(
    ("sequences", "params", "microseconds"),
    [(1, PLAIN, 50), (16, PLAIN, 75), (1, CONSTRAINED, 50), (16, CONSTRAINED, 100)],
)
def test_a_step_of_the_engine_costs_little(sequences: int, params: SamplingParams, microseconds: float) -> None:
    engine = Engine(Nothing(), vocabulary=100)  # type: ignore[arg-type]
    for i in range(sequences):
        engine.add(list(range(1, 20 + i)), params)
    for _ in range(5):
        engine.step()
    best = reference = np.inf
    for _ in range(30):  # CPU time, and the least disturbed of many: the machine may be busy
        started = time.process_time_ns()
        for _ in range(50):
            engine.step()
        best = min(best, (time.process_time_ns() - started) / 50 / 1000)
        reference = min(reference, reference_microseconds())
    assert len(engine.scheduler.running) == sequences
    slower = max(1.0, reference / 200)  # this machine, now, than the one that the limit is stated for
    assert best < microseconds * slower, f"{best:.0f} us a step on a machine {slower:.1f} times slower than the stated"
