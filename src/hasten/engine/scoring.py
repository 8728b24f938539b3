"""A step's rows: those that draw a next token, and those that say what the model thinks of a prompt."""

from __future__ import annotations

from array import array
from functools import lru_cache

import numpy as np

from hasten.backends.batch import Outputs, Sampled
from hasten.engine.request import SamplingParams, Sequence
from hasten.engine.sampler import Sampler, record
from hasten.engine.scheduler import Span


def draw(spans: list[Span], outputs: Outputs, sampler: Sampler) -> list[int]:
    """The next token of each sequence that draws; log-probabilities are noted with the sequences."""
    drawing = [span.sequence for span in spans if span.draws]
    if not any(span.scores for span in spans):
        if not drawing:
            return []
        sampled = outputs.sample(sampler.batch(drawing))
    else:
        sampled = _scored(spans, outputs, sampler)
    record(drawing, sampled)
    tokens: list[int] = sampled.tokens.tolist()
    return tokens


def _scored(spans: list[Span], outputs: Outputs, sampler: Sampler) -> Sampled:
    """As Outputs.sample of the rows that draw, while all others' scores are noted."""
    who: list[Sequence] = []  # [rows]
    targets: list[int] = []  # [rows]; of a row that draws it does not matter
    for span in spans:
        sequence, last = span.sequence, span.stop - span.draws
        if sequence.scores and span.scores:
            who += [_scorer(sequence.scores.top)] * span.scores
            targets += sequence.tokens[last - span.scores + 1 : last + 1]
        if span.draws:
            who.append(sequence)
            targets.append(0)
    logprobs = outputs.score(np.array(targets, np.int32)).tolist()
    sampled = outputs.sample(sampler.batch(who))
    row, drawn = 0, []
    for span in spans:
        scores = span.sequence.scores
        if scores and span.scores:
            part = slice(row, row + span.scores)
            scores.logprobs += logprobs[part]
            pairs = zip(sampled.top_tokens[part].tolist(), sampled.top_logprobs[part].tolist(), strict=True)
            scores.likeliest += [list(zip(t, v, strict=True))[: scores.top] for t, v in pairs]
        row += span.rows
        if span.draws:
            drawn.append(row - 1)
    return Sampled(
        sampled.tokens[drawn], sampled.logprobs[drawn], sampled.top_tokens[drawn], sampled.top_logprobs[drawn]
    )


@lru_cache(maxsize=64)
def _scorer(top: int) -> Sequence:
    """What stands for a scored row where rows are drawn: greedy, with the log-probabilities that are asked for."""
    return Sequence(array("i", [0]), 0, SamplingParams(temperature=0, logprobs=top), 0, 0)
