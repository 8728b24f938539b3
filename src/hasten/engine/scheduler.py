"""What the next step computes: continuous batching with chunked prefill under a token budget. No numerics here.

Sequences run in the order of their rank: by priority, and by arrival within one. Each one that decodes gets its token;
prompts share what the budget leaves, and no more than a small chunk while others decode, whose next tokens wait for the
step. When blocks run out, the last in rank of those running gives its blocks up and
computes its tokens again later, so the first always goes on, and every sequence ends.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from hasten.engine.blocks import Blocks, chain
from hasten.engine.request import Sequence

PATIENCE = 256
"""Steps that one level of priority is worth: what waits longer goes before what comes later, so that nobody starves."""
MIXED_TOKENS = 96
"""Of prompts in a step in which others decode. Kernels compute a chunk of so many as fast a token as one of 512 (within
3%, docs/kernels.md), and a decoding client waits a quarter as long for its next token. With a third of it, waits are
halved again, and throughput and first tokens lose a tenth."""

_RANK = attrgetter("rank")


@dataclass(slots=True)
class Span:
    """Tokens [start, stop) of a sequence, to be computed in this step.

    `draws`: the step brings the sequence up to date, so that its next token can be drawn. `scores`: how many of the
    rows before that one say what the model thinks of the prompt's next token.
    """

    sequence: Sequence
    start: int
    stop: int
    draws: bool
    scores: int = 0

    @property
    def rows(self) -> int:
        """Rows whose logits are wanted: the last of the span."""
        return self.scores + self.draws


class Scheduler:
    """`max_tokens` in a step, `max_sequences` at once, `max_rows` whose logits a step can give."""

    def __init__(self, blocks: Blocks, max_tokens: int, max_sequences: int, max_rows: int = 0) -> None:
        assert max_tokens >= max_sequences, "each sequence needs room for a token in a step"
        self.blocks = blocks
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.max_rows = max(max_rows, max_sequences)
        self.waiting: list[Sequence] = []  # both are in the order of rank
        self.running: list[Sequence] = []
        self.moves = 0  # counts what may leave a sequence with other blocks than before and some more
        self.steps = 0
        self.prompt_tokens = 0  # of all admitted, and how many of them were found in the cache
        self.found_tokens = 0
        self.preemptions = 0
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must fit the cache when it is alone there."""
        assert self.blocks.needed(sequence.limit) <= self.blocks.count, "a sequence that can never be held"
        self._arrivals += 1
        sequence.rank = (self.steps + sequence.priority * PATIENCE, self._arrivals)
        insort(self.waiting, sequence, key=_RANK)

    def plan(self) -> list[Span]:
        """Spans for the next step, with blocks to write to; none only where nothing is left to do."""
        self.steps += 1
        spans: list[Span] = []
        size = self.blocks.size
        decoding = sum([len(s.tokens) - s.computed == 1 for s in self.running])
        budget = min(self.max_tokens - decoding, MIXED_TOKENS if decoding else self.max_tokens)
        spare_rows = self.max_rows - len(self.running)  # each one has a row of its own
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            start, end = sequence.computed, len(sequence.tokens)
            stop = end if start + 1 == end else min(end, start + budget)
            if sequence.scores:
                stop = _with_rows(sequence, stop, spare_rows)
            if start < stop and (stop <= len(sequence.blocks) * size or self._make_room(sequence, stop - start)):
                spans.append(_span(sequence, stop))
                if start + 1 != end:
                    budget -= stop - start
                    spare_rows -= max(spans[-1].rows - 1, 0)
            position += 1
        self._admit_waiting(spans, budget, spare_rows)
        return spans

    def _admit_waiting(self, spans: list[Span], budget: int, spare_rows: int) -> None:
        while (
            self.waiting
            and budget > 0
            and spare_rows > 0
            and len(self.running) < self.max_sequences
            and self._admit(self.waiting[0])
        ):
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=_RANK)
            spare_rows -= 1
            stop = _with_rows(sequence, sequence.computed + min(sequence.remaining, budget), spare_rows)
            budget -= stop - sequence.computed
            self._take(sequence, stop - sequence.computed)
            spans.append(_span(sequence, stop))
            spare_rows -= max(spans[-1].rows - 1, 0)

    def commit(self, spans: list[Span]) -> None:
        """The step is done: its tokens are in the cache, and blocks that it filled can be found by others."""
        size = self.blocks.size
        for span in spans:
            sequence, stop = span.sequence, span.stop
            sequence.computed = stop
            if stop - span.start == 1 and stop % size:
                continue
            for index in range(span.start // size, stop // size):
                self.blocks.name(sequence.blocks[index], self._hash(sequence, index))

    def finish(self, sequence: Sequence) -> None:
        """Give back what a sequence holds, whether it ended or nobody wants it any more."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._empty(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Take blocks of its prefix that are known; False where there is no room for all of its tokens now, or where
        the next block is just being computed for another: of one prompt sent many times, the first computes it for all.

        The last token is always computed: its row gives the next one. So are those whose rows are still to be scored.
        """
        full = (len(sequence.tokens) - 1) // self.blocks.size if not _unscored(sequence) else 0
        known = self.blocks.find(self._hash(sequence, i) for i in range(full))
        held = sum(self.blocks.references[b] > 0 for b in known)
        if self.blocks.needed(len(sequence.tokens)) - held > self.blocks.free:
            return False
        if len(known) < full and self._being_computed(sequence, len(known)):
            return False
        for block in known:
            self.blocks.share(block)
        sequence.blocks.extend(known)
        self.moves += 1
        sequence.computed = len(known) * self.blocks.size
        if not sequence.preemptions:  # later it finds what it has computed itself
            sequence.cached = sequence.computed
            self.prompt_tokens += len(sequence.tokens)
            self.found_tokens += sequence.cached
        return True

    def _being_computed(self, sequence: Sequence, index: int) -> bool:
        """Whether one that goes before `sequence` is just about to compute that block of it."""
        size = self.blocks.size
        return any(
            other.computed // size == index < (len(other.tokens) - 1) // size
            and other.rank < sequence.rank
            and self._hash(other, index) == self._hash(sequence, index)
            for other in self.running
        )

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens; the last in rank make room. False where the sequence itself was the last."""
        needed = self.blocks.needed(sequence.computed + count) - len(sequence.blocks)
        while self.blocks.free < needed:
            last = self.running.pop()
            last.preemptions += 1
            self.preemptions += 1
            self._empty(last)
            insort(self.waiting, last, key=_RANK)
            if last is sequence:
                return False
        self._take(sequence, count)
        return True

    def _take(self, sequence: Sequence, count: int) -> None:
        """Blocks for `count` more tokens, which are free."""
        needed = self.blocks.needed(sequence.computed + count) - len(sequence.blocks)
        sequence.blocks.extend(self.blocks.take() for _ in range(needed))

    def _empty(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        del sequence.blocks[:]
        self.moves += 1
        sequence.computed = 0

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Of the sequence's full block `index`."""
        size = self.blocks.size
        while len(sequence.hashes) <= index:
            at = len(sequence.hashes)
            parent = sequence.hashes[-1] if sequence.hashes else sequence.salt
            sequence.hashes.append(chain(parent, sequence.tokens[at * size : (at + 1) * size]))
        return sequence.hashes[index]


def _unscored(sequence: Sequence) -> int:
    """Rows of its prompt that are yet to be scored; the prompt's last row has nothing to be scored against."""
    return sequence.prompt_length - 1 - len(sequence.scores.logprobs) if sequence.scores else 0


def _with_rows(sequence: Sequence, stop: int, spare_rows: int) -> int:
    """`stop`, or sooner where the step has not rows enough to score all tokens up to it."""
    if not _unscored(sequence):
        return stop
    assert sequence.scores
    return min(stop, max(sequence.computed, len(sequence.scores.logprobs)) + 1 + spare_rows)


def _span(sequence: Sequence, stop: int) -> Span:
    start = sequence.computed
    scores = 0
    if sequence.scores:
        scores = max(0, min(stop, sequence.prompt_length - 1) - max(start, len(sequence.scores.logprobs)))
    return Span(sequence, start, stop, stop == len(sequence.tokens), scores)
