"""How far offline generation is, in tokens: one long answer moves it as well as many short ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from hasten.engine.request import Sequence

Report = Callable[[str, int, int], None]
QUIET_SECONDS = 2.0
TERMINAL_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Between two lines where stderr is no terminal."""


class Progress:
    """Tells `report` of ("generating", tokens, tokens at most), and shows lines on stderr where `shown` is true.

    Tokens are the prompts' and the answers'; an answer that ends early counts as if it were as long as it might be.
    """

    def __init__(self, choices: list[Sequence], report: Report | None, shown: bool) -> None:
        self._choices, self._report, self._shown = choices, report, shown
        self._total = sum(choice.limit for choice in choices)
        self._started = time.monotonic()
        self._told = 0.0
        self._next = self._started + QUIET_SECONDS
        self._open = False

    def step(self) -> None:
        """After each step of the engine."""
        now = time.monotonic()
        if self._report and now - self._told >= TERMINAL_SECONDS:
            self._told = now
            self._report("generating", sum(map(_done, self._choices)), self._total)
        if self._shown and now >= self._next:
            self._show(now)

    def close(self, whole: bool) -> None:
        """All is over; `whole`: and nothing came between."""
        if whole and self._report:
            self._report("generating", self._total, self._total)
        if self._open:
            self._show(time.monotonic())
            print(file=sys.stderr, flush=True)

    def _show(self, now: float) -> None:
        terminal = sys.stderr.isatty()
        self._next = now + (TERMINAL_SECONDS if terminal else LINE_SECONDS)
        ended = sum(choice.finish_reason is not None for choice in self._choices)
        read = sum(min(_done(choice), choice.prompt_length) for choice in self._choices)
        written = sum(len(choice.tokens) - choice.prompt_length for choice in self._choices)
        rate = written / max(now - self._started, 1e-9)
        counts = f"{ended} of {len(self._choices)} done, {read} tokens read, {written} written, {rate:.1f} tokens/s"
        self._open = terminal
        begin, end = ("\r", "\x1b[K") if terminal else ("", "\n")
        print(f"{begin}generating: {counts}", end=end, file=sys.stderr, flush=True)


def _done(choice: Sequence) -> int:
    """Tokens of a choice; one that was preempted has not lost what it wrote."""
    if choice.finish_reason is not None:
        return choice.limit
    written = len(choice.tokens) > choice.prompt_length
    return len(choice.tokens) if written else choice.computed
