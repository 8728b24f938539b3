"""Peak memory of serving a model, measured the only honest way: in a process that does nothing else.

`peak_memory` starts `python -m hasten.bench.peak`, which opens the model, runs prompts and a few decoding steps, and
prints the most memory it held: interpreter, libraries, loading, weights (mapped pages count once read), cache, buffers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from hasten import checkpoint
from hasten.bench.latency import Loaded
from hasten.bench.machine import peak_resident
from hasten.engine.llm import DEFAULT_CONTEXT
from hasten.errors import BackendError


def peak_memory(source: str, *, prompt: int = 512, new: int = 8, batch: int = 1, threads: int = 0) -> int:
    """Bytes of the largest resident set of a fresh process that serves `source` as `Loaded` would.

    Raises BackendError where that process fails, with its last words.
    """
    sizes = {"prompt": prompt, "new": new, "batch": batch, "threads": threads}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "hasten.bench.peak", *flags, "--", source]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BackendError(f"measuring the peak memory of {source} failed: {words[-1]}")
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    for name in ("prompt", "new", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    sizes = vars(parser.parse_args())
    model = checkpoint.open(sizes.pop("source"))
    context = max(DEFAULT_CONTEXT, sizes["prompt"] + sizes["new"])
    model = model.at_context(min(model.graph.context, context))  # as it is served: rope may depend on it
    subject = Loaded(model.graph, model.weights(), **sizes)
    subject.prefill(sizes["batch"])
    subject.decode(sizes["batch"])
    print(peak_resident())


if __name__ == "__main__":
    main()
