"""What every runner speaks: a JSON object a line on stdin, {"call": NAME, ...}, and one a line on stdout.

A runner stays up between calls, so that loading is not timed. Every engine is asked for the same: prompts of the same
number of random tokens, greedy steps of the same number of sequences. This file needs no more than NumPy.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

MAX_REPEATS = 25


class Engine:
    """One model in one engine. A subclass says how; this times it.

    `load` sets `vocabulary`. `prompt(tokens)` runs a prompt from an empty cache to its first token. `fill` brings
    `batch` caches to `depth` tokens, `rewind` brings them back there after steps, neither is timed; `steps` decodes.
    """

    vocabulary = 0
    filled: tuple[int, int] | None = None

    def load(self, **settings: Any) -> dict[str, Any]:
        raise NotImplementedError

    def prompt(self, tokens: list[int]) -> None:
        raise NotImplementedError

    def fill(self, batch: int, depth: int) -> None:
        raise NotImplementedError

    def rewind(self, batch: int, depth: int) -> None:
        pass

    def steps(self, batch: int, depth: int, new: int) -> None:
        raise NotImplementedError

    def prefill(self, tokens: int, least: float) -> dict[str, Any]:
        """Seconds of one prompt, the median of as many as `least` seconds hold."""
        self.filled = None
        given = random_tokens(tokens, self.vocabulary)
        return repeated(lambda: self.prompt(given), lambda: None, least)

    def decode(self, batch: int, depth: int, new: int, least: float) -> dict[str, Any]:
        """Seconds of `new` steps of `batch` sequences from `depth`, the median of as many as `least` seconds hold."""
        if self.filled != (batch, depth):
            self.fill(batch, depth)
            self.filled = (batch, depth)
        return repeated(lambda: self.steps(batch, depth, new), lambda: self.rewind(batch, depth), least)

    def first_token(self, tokens: int) -> dict[str, Any]:
        """One prompt; whoever started this process takes the time."""
        self.filled = None
        self.prompt(random_tokens(tokens, self.vocabulary))
        return {}

    def peak(self) -> dict[str, Any]:
        return {"bytes": peak_resident()}


def repeated(timed: Callable[[], None], untimed: Callable[[], None], least: float) -> dict[str, Any]:
    taken: list[float] = []
    while not taken or (sum(taken) < least and len(taken) < MAX_REPEATS):
        untimed()
        started = time.perf_counter()
        timed()
        taken.append(time.perf_counter() - started)
    return {"seconds": median(taken), "repeats": len(taken)}


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, count)]


def peak_resident() -> int:
    """Bytes of this process's largest resident set; 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def serve(engine: Engine) -> None:
    """Answer until stdin ends. What libraries print goes to stderr: stdout is for answers alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(engine, request.pop("call"))(**request)
        except Exception as error:
            traceback.print_exc()
            words = (str(error).strip() or "no more is known").splitlines()[0]
            answer = {"error": f"{type(error).__name__}: {words[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)
