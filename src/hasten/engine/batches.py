"""Spans as the flat arrays that a backend takes. While the same sequences decode, only tokens and positions are new."""

from __future__ import annotations

import numpy as np

from hasten.backends.batch import Batch, Int32
from hasten.engine.blocks import Blocks
from hasten.engine.request import Sequence
from hasten.engine.scheduler import Span


class Batches:
    """Keeps what does not change from one decoding step to the next: starts, rows, and block tables but for ends."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._moves = -1
        self._sequences: list[Sequence] = []
        self._tables: Int32 = np.zeros((0, 0), np.int32)
        self._held: list[int] = []
        """How many blocks of each sequence stand in the tables."""
        self._counts: Int32 = np.zeros(1, np.int32)

    def batch(self, spans: list[Span], moves: int) -> Batch:
        """The arrays of one step; the rows wanted are the last of each sequence that draws or is scored.

        `moves` is Scheduler.moves: while it stays, a sequence's blocks only get more.
        """
        tables = self._block_tables([span.sequence for span in spans], moves)
        count = len(spans)
        if all(span.draws and span.stop - span.start == 1 and not span.scores for span in spans):
            return Batch(
                tokens=np.array([span.sequence.tokens[-1] for span in spans], np.int32),
                positions=np.array([span.start for span in spans], np.int32),
                starts=self._counts[: count + 1],
                block_tables=tables,
                rows=self._counts[:count],
            )
        ends = np.cumsum([span.stop - span.start for span in spans])
        return Batch(
            tokens=np.concatenate([np.array(s.sequence.tokens[s.start : s.stop], np.int32) for s in spans]),
            positions=np.concatenate([np.arange(s.start, s.stop, dtype=np.int32) for s in spans]),
            starts=np.array([0, *ends], np.int32),
            block_tables=tables,
            rows=np.array([r for e, s in zip(ends, spans, strict=True) for r in range(e - s.rows, e)], np.int32),
        )

    def _block_tables(self, sequences: list[Sequence], moves: int) -> Int32:
        """[sequences, blocks], as wide as they may ever need; -1 past a sequence's last block."""
        if moves != self._moves or sequences != self._sequences:
            width = self._blocks.needed(max(s.limit for s in sequences))
            self._tables = np.full((len(sequences), width), -1, np.int32)
            self._moves, self._sequences, self._held = moves, sequences, [0] * len(sequences)
            if len(self._counts) <= len(sequences):
                self._counts = np.arange(len(sequences) + 1, dtype=np.int32)
        for row, (sequence, held) in enumerate(zip(sequences, self._held, strict=True)):
            count = len(sequence.blocks)
            if count != held:
                self._tables[row, held:count] = sequence.blocks[held:]
                self._held[row] = count
        return self._tables
