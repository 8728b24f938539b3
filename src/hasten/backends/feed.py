"""Runs whole token windows through a program, each from an empty cache: for evaluation, calibration and benches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hasten.backends.batch import Batch, Int32, Limits


def window_limits(window: int, chunk: int = 256, **others: object) -> Limits:
    """Limits for feeding windows of up to `window` tokens, `chunk` at a time, all rows wanted."""
    block_size = 32
    return Limits(
        context=window,
        max_tokens=min(chunk, window),
        max_rows=min(chunk, window),
        max_sequences=1,
        block_size=block_size,
        kv_blocks=-(-window // block_size),
        **others,  # type: ignore[arg-type]
    )


def windows(tokens: Sequence[Int32], limits: Limits) -> Iterator[tuple[int, int, Batch]]:
    """(index of the window, position of its first row, batch) for every chunk of every window; all rows are wanted.

    Chunks of a window follow each other, so its cache fills as it should; the next starts over in the same blocks.
    """
    chunk = min(limits.max_tokens, limits.max_rows)
    table = np.arange(limits.kv_blocks, dtype=np.int32)[None, :]
    for index, window in enumerate(tokens):
        for start in range(0, len(window), chunk):
            part = np.ascontiguousarray(window[start : start + chunk], dtype=np.int32)
            count = len(part)
            yield (
                index,
                start,
                Batch(
                    tokens=part,
                    positions=np.arange(start, start + count, dtype=np.int32),
                    starts=np.array([0, count], dtype=np.int32),
                    block_tables=table,
                    rows=np.arange(count, dtype=np.int32),
                ),
            )
