"""The protocol, on a program made of a table: what follows a token depends on it and on its position alone."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.backends.batch import Batch, Limits
from hasten.errors import CheckpointError, InputError
from hasten.evaluate.perplexity import score

VOCABULARY = 7


class TableOutputs:
    def __init__(self, logits: np.ndarray) -> None:
        self.raw = logits

    def log_softmax(self) -> np.ndarray:
        x = self.raw - self.raw.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def score(self, targets: np.ndarray) -> np.ndarray:
        return self.log_softmax()[np.arange(len(targets)), targets].astype(np.float32)

    def argmax(self) -> np.ndarray:
        return self.raw.argmax(-1)

    def divergence(self, reference: TableOutputs) -> np.ndarray:
        p, q = reference.log_softmax(), self.log_softmax()
        return (np.exp(p) * (p - q)).sum(-1)


class TableProgram:
    def __init__(self, seed: int, max_tokens: int = 4, scale: float = 1.0) -> None:
        self.table = scale * np.random.default_rng(seed).normal(size=(64, VOCABULARY, VOCABULARY))
        self.limits = Limits(context=64, max_tokens=max_tokens, max_rows=max_tokens, kv_blocks=2)
        self.seen: list[tuple[int, int]] = []

    def logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.table[positions, tokens]

    def step(self, batch: Batch) -> TableOutputs:
        assert len(batch.rows) <= self.limits.max_rows
        self.seen += list(zip(batch.positions.tolist(), batch.tokens.tolist(), strict=True))
        return TableOutputs(self.logits(batch.tokens, batch.positions)[batch.rows])


def cut(lengths: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(9)
    return [random.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]


def by_hand(program: TableProgram, windows: list[np.ndarray]) -> list[float]:
    """Every token but a window's first, in plain loops."""
    found = []
    for window in windows:
        for i in range(1, len(window)):
            logits = program.logits(window[i - 1 : i], np.array([i - 1]))[0]
            found.append(logits[window[i]] - np.log(np.exp(logits).sum()))
    return found


@pytest.mark.parametrize("max_tokens", [1, 3, 4, 64])
def test_every_token_but_a_windows_first_is_scored(max_tokens: int) -> None:
    program, windows = TableProgram(0, max_tokens), cut([10, 10, 5])
    found = score(program, windows)
    expected = by_hand(program, windows)
    assert found.tokens == 9 + 9 + 4
    assert found.perplexity == pytest.approx(np.exp(-np.mean(expected)), rel=1e-6)
    np.testing.assert_allclose(np.concatenate(found.logprobs), expected, rtol=1e-5)
    assert found.ci95 is not None
    assert found.ci95[0] < found.perplexity < found.ci95[1]
    assert found.kl_divergence is None
    assert found.top1_agreement is None


def test_each_window_begins_at_an_empty_cache() -> None:
    program, windows = TableProgram(0), cut([10, 5])
    score(program, windows)
    assert [position for position, _ in program.seen] == [*range(9), *range(4)]


def test_divergence_and_agreement_in_lockstep() -> None:
    program, reference, windows = TableProgram(1), TableProgram(2), cut([12, 7])
    found = score(program, windows, reference)
    apart, same = [], []
    for window in windows:
        for i in range(len(window) - 1):
            p, q = (np.exp(x) / np.exp(x).sum() for x in (t.table[i, window[i]] for t in (reference, program)))
            apart.append(sum(p[k] * np.log(p[k] / q[k]) for k in range(VOCABULARY)))
            same.append(p.argmax() == q.argmax())
    assert found.kl_divergence == pytest.approx(np.mean(apart))
    assert found.top1_agreement == pytest.approx(np.mean(same))
    assert found.reference_logprobs is not None
    np.testing.assert_allclose(np.concatenate(found.reference_logprobs), by_hand(reference, windows), rtol=1e-5)


def test_a_model_against_itself_is_no_distance_away() -> None:
    found = score(TableProgram(1), cut([12]), TableProgram(1))
    assert found.kl_divergence == pytest.approx(0, abs=1e-12)
    assert found.top1_agreement == 1


def test_progress_ends_at_the_total() -> None:
    told: list[tuple[str, int, int]] = []
    score(TableProgram(0), cut([10, 5]), report=lambda *stage: told.append(stage))
    assert told[-1] == ("scoring", 13, 13)


def test_broken_weights_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        score(TableProgram(0, scale=float("nan")), cut([5]))


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(InputError, match="too short"):
        score(TableProgram(0), [])
