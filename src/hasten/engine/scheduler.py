"""What the next step computes: continuous batching with chunked prefill under a token budget. No numerics here.

Sequences run in the order of their arrival. Each one that decodes gets its token; prompts share what the budget leaves.
When blocks run out, the youngest running sequence gives its blocks up and computes its tokens again later, so the
oldest always goes on, and every sequence ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hasten.engine.blocks import Blocks, chain
from hasten.engine.request import Sequence


@dataclass(slots=True)
class Span:
    """Tokens [start, stop) of a sequence, to be computed in this step.

    `draws`: the step brings the sequence up to date, so that its next token can be drawn.
    """

    sequence: Sequence
    start: int
    stop: int
    draws: bool


class Scheduler:
    """`max_tokens` in a step, `max_sequences` at once."""

    def __init__(self, blocks: Blocks, max_tokens: int, max_sequences: int) -> None:
        assert max_tokens >= max_sequences, "each sequence needs room for a token in a step"
        self.blocks = blocks
        self.max_tokens = max_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first; all older than those waiting
        self.moves = 0  # counts what may leave a sequence with other blocks than before and some more

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must fit the cache when it is alone there."""
        assert self.blocks.needed(sequence.limit) <= self.blocks.count, "a sequence that can never be held"
        self.waiting.append(sequence)

    def plan(self) -> list[Span]:
        """Spans for the next step, with blocks to write to; none only where nothing is left to do."""
        spans: list[Span] = []
        size = self.blocks.size
        budget = self.max_tokens - sum([len(s.tokens) - s.computed == 1 for s in self.running])
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            start, end = sequence.computed, len(sequence.tokens)
            stop = end if start + 1 == end else min(end, start + budget)
            if start < stop and (stop <= len(sequence.blocks) * size or self._make_room(sequence, stop - start)):
                spans.append(Span(sequence, start, stop, stop == end))
                if start + 1 != end:
                    budget -= stop - start
            position += 1
        self._admit_waiting(spans, budget)
        return spans

    def _admit_waiting(self, spans: list[Span], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            count = min(sequence.remaining, budget)
            budget -= count
            self._make_room(sequence, count)
            stop = sequence.computed + count
            spans.append(Span(sequence, sequence.computed, stop, stop == len(sequence.tokens)))

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
        """Take blocks of its prefix that are known; False where there is no room for all of its tokens now.

        The last token is always computed: its row gives the next one.
        """
        full = (len(sequence.tokens) - 1) // self.blocks.size
        known = self.blocks.find(self._hash(sequence, i) for i in range(full))
        held = sum(self.blocks.references[b] > 0 for b in known)
        if self.blocks.needed(len(sequence.tokens)) - held > self.blocks.free:
            return False
        for block in known:
            self.blocks.share(block)
        sequence.blocks.extend(known)
        self.moves += 1
        sequence.computed = sequence.cached = len(known) * self.blocks.size
        return True

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens; the youngest make room. False where the sequence itself was the youngest."""
        needed = self.blocks.needed(sequence.computed + count) - len(sequence.blocks)
        if not needed:
            return True
        while self.blocks.free < needed:
            youngest = self.running.pop()
            youngest.preemptions += 1
            self._empty(youngest)
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        sequence.blocks.extend(self.blocks.take() for _ in range(needed))
        return True

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
            parent = sequence.hashes[-1] if sequence.hashes else b""
            sequence.hashes.append(chain(parent, sequence.tokens[at * size : (at + 1) * size]))
        return sequence.hashes[index]
