"""Sequences' sampling parameters as the arrays that a backend draws by."""

from __future__ import annotations

import numpy as np

from hasten.backends.batch import Sampled, SamplingBatch
from hasten.engine.request import SamplingParams, Sequence

_NOTHING = np.zeros(0, dtype=np.int32)
_NO_BIAS = np.zeros(0, dtype=np.float32)
_NO_MASK = np.zeros(0, dtype=np.uint32)


class Sampler:
    """Arrays of the last step are used again while the same sequences draw; positions, histories and bans are new."""

    def __init__(self) -> None:
        self._last: list[Sequence] = []
        self._batch: SamplingBatch | None = None
        self._penalised = self._constrained = False

    def batch(self, sequences: list[Sequence]) -> SamplingBatch:
        """How to draw the next token of each of `sequences`, in this order."""
        if self._batch is None or sequences != self._last:
            self._last, self._batch = sequences, _build(sequences)
            self._penalised = any(penalised(s.params) for s in sequences)
            self._constrained = any(s.constraints is not None for s in sequences)
        self._batch.position[:] = [len(s.tokens) for s in sequences]
        if self._penalised:
            self._batch.history = [np.array(s.tokens, np.int32) if penalised(s.params) else _NOTHING for s in sequences]
        if self._constrained:
            constraints = [(s, s.constraints) for s in sequences]
            self._batch.banned = [_NOTHING if c is None else c.banned(s) for s, c in constraints]
            self._batch.allowed = [_NO_MASK if c is None else c.allowed(s) for s, c in constraints]
        return self._batch


def penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _build(sequences: list[Sequence]) -> SamplingBatch:
    params = [s.params for s in sequences]
    batch = SamplingBatch(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([max(p.top_k, 0) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        repetition=np.array([p.repetition_penalty for p in params], np.float32),
        presence=np.array([p.presence_penalty for p in params], np.float32),
        frequency=np.array([p.frequency_penalty for p in params], np.float32),
        seed=np.array([s.seed for s in sequences], np.uint64),
        position=np.zeros(len(sequences), np.int64),
        history=[_NOTHING] * len(sequences),
        prompt_length=np.array([s.prompt_length * penalised(s.params) for s in sequences], np.int32),
        logprobs=max((p.logprobs or 0 for p in params), default=0),
    )
    if any(p.typical_p < 1 for p in params):
        batch.typical_p = np.array([p.typical_p for p in params], np.float32)
    constraints = [s.constraints for s in sequences]
    if any(constraints):
        batch.bias_tokens = [c.bias_tokens if c else _NOTHING for c in constraints]
        batch.bias = [c.bias if c else _NO_BIAS for c in constraints]
    return batch


def record(sequences: list[Sequence], sampled: Sampled) -> None:
    """Note the log-probabilities of the drawn tokens, one a sequence, as far as the requests want them."""
    for sequence, value in zip(sequences, sampled.logprobs.tolist(), strict=True):
        sequence.logprobs.append(value)
    if not sampled.top_tokens.size:
        return
    for row, sequence in enumerate(sequences):
        count = sequence.params.logprobs
        if count:
            tokens, values = sampled.top_tokens[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist()
            sequence.top.append(list(zip(tokens, values, strict=True)))
