"""Runs `accelerate` in a process of its own, which kills itself without warning at a named moment.

Arguments: model, text, output, moment. A moment is "put 7" (as the seventh measurement is to be kept), "report 3",
"fsync 1", "rename 1", "rmtree 1"; or "never". What the clock would decide is fixed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.bench import latency, machine, peak
from hasten.search import batches, candidates, cost, domains
from hasten.search.accelerate import accelerate
from hasten.search.job import Settings
from hasten.search.trials import Trials


def main(model: str, text: str, output: str, moment: str) -> None:
    seen: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **others: Any) -> Any:
            seen[name] += 1
            if moment == f"{name} {seen[name]}":
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **others)

        return call

    machine.limits = lambda seconds=0.0, threads=0: machine.Limits(10.0, 100.0, 100.0, 1)
    peak.peak_memory = lambda source, **sizes: 1_000_000
    latency.ENOUGH_SECONDS = 0.0
    candidates.FORMATS = ("bf16", "int8-g64", "int4-g32", "codebook4-g64")
    domains.TOKENS, batches.SIZES = 600, (1, 2)
    cost.seconds = lambda site, cold, threads: 1e-6
    Trials.put = counted("put", Trials.put)
    os.fsync, os.rename, shutil.rmtree = (
        counted("fsync", os.fsync),
        counted("rename", os.rename),
        counted("rmtree", shutil.rmtree),
    )
    settings = Settings(model, Path(output), "kl=0.05", eval=Path(text), objective="memory", threads=1)
    accelerate(settings, counted("report", lambda stage, done, total: None), lambda text: None)
    print(" ".join(f"{name}={count}" for name, count in seen.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
