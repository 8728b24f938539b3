"""`hasten accelerate`: the fastest form of a model on this machine within a quality budget, proven on held-out text."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path

from hasten.cli.cache import size_in_bytes
from hasten.cli.options import argument, option, required
from hasten.cli.progress import reporter

HELP = "make a model faster on this machine, within a quality budget"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="a Hugging Face directory, a hub id, a hasten artifact, or demo")
    output: Path = required("-o", help="directory to write; must not exist", metavar="OUT")
    budget: tuple[str, ...] = option(
        (),
        help="what may be lost: ppl=P% (growth of perplexity), kl=N (nats a token from the original), agree=P% (tokens "
        "whose likeliest next one stays), task=FILE.jsonl:-Npt (accuracy); several with commas or again: all must hold "
        "(default: ppl=1%, or with --target the least that reaches it)",
        metavar="BUDGET",
        repeat=True,
    )
    calibration: Path | None = option(None, help="text to gather statistics on", metavar="FILE")
    eval: Path | None = option(None, help="text to search and to prove the budget on", metavar="FILE")
    other: Path | None = option(None, help="text of another domain, to see how quality holds there", metavar="FILE")
    objective: str | None = option(
        None, help="what to make cheap (default: decode)", choices=("decode", "prefill", "throughput", "memory")
    )
    batch: int | None = option(
        None, help="sequences that step together (default: 1, with --objective throughput 16)", metavar="N"
    )
    lengths: str | None = option(None, help="tokens of a prompt and new ones (default: 512:64)", metavar="PROMPT:NEW")
    trace: Path | None = option(None, help="take the lengths from a trace, as bench-serve reads it", metavar="FILE")
    target: str | None = option(
        None, help="a speed to reach with the least loss, as decode=50tok/s or prefill=2000tok/s", metavar="PART=RATE"
    )
    memory_cap: str | None = option(
        None, help="that weights, cache and buffers may take when it serves, as 500MB", metavar="SIZE"
    )
    threads: int = option(0, help="threads to use; 0: all that this process may")
    minutes: float = option(
        55, help="time for all of it, 0 for as long as it takes; the best known by then is proven", metavar="N"
    )
    peers: Path | None = option(
        None, help="report.json of `hasten bench --against`, whose engines the report shows beside", metavar="FILE"
    )
    keep_shape: bool = option(False, help="no narrower feed-forwards, no block less: for formats that cannot say them")
    keep_work: bool = option(False, help="keep the folder OUT.work with all measurements")
    json: bool = option(False, help="print everything found as JSON")


def run(options: Options) -> int:
    from hasten.search import table
    from hasten.search.accelerate import accelerate
    from hasten.search.job import Settings

    settings = Settings(
        model=options.model,
        output=options.output,
        budget=options.budget,
        calibration=options.calibration,
        eval=options.eval,
        objective=options.objective,
        threads=options.threads,
        minutes=options.minutes or None,
        keep_work=options.keep_work,
        keep_shape=options.keep_shape,
        batch=options.batch,
        lengths=options.lengths,
        trace=options.trace,
        target=options.target,
        memory_cap=None if options.memory_cap is None else size_in_bytes(options.memory_cap),
        other=options.other,
        peers=options.peers,
    )
    try:
        with reporter() as report:
            outcome = accelerate(settings, report, lambda text: print(f"note: {text}", file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("note: the same command, given again, continues from here", file=sys.stderr)
        raise
    if options.json:
        print(json_module.dumps(outcome.document, indent=1))
    if outcome.output is None:
        print(f"{outcome.reason}; nothing was written", file=sys.stderr if options.json else sys.stdout)
        return 1
    if not options.json:
        show(table.rows(outcome.document))
        print(f"\n{table.headline(outcome.document)}.")
        print(f"artifact: {outcome.output}\nreport:   {outcome.output / 'report.html'}")
    return 0


def show(rows: list[tuple[str, str, str, str]]) -> None:
    """The table in columns, plain."""
    lines = [("", "original", "accelerated", "change"), *rows]
    widths = [max(len(row[i]) for row in lines) for i in range(4)]
    for number, row in enumerate(lines):
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())
        if number == 0:
            print("-" * (sum(widths) + 6))
