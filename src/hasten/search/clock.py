"""The time that a search may take."""

from __future__ import annotations

import math
import time


class Clock:
    """Seconds until the limit; without one there are always enough."""

    def __init__(self, minutes: float | None) -> None:
        self.limit = math.inf if minutes is None else 60 * minutes
        self._start = time.monotonic()

    def left(self) -> float:
        return self.limit - (time.monotonic() - self._start)

    @property
    def limited(self) -> bool:
        return self.limit < math.inf
