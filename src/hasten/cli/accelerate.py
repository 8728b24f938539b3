"""`hasten accelerate`: the fastest form of a model on this machine within a quality budget, proven on held-out text."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path

from hasten.cli.options import argument, option, required
from hasten.cli.progress import reporter

HELP = "make a model faster on this machine, within a quality budget"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="a Hugging Face directory, a hub id, a hasten artifact, or demo")
    output: Path = required("-o", help="directory to write; must not exist", metavar="OUT")
    budget: str = option("ppl=1%", help="ppl=P% (growth of perplexity) or kl=N (nats a token from the original)")
    calibration: Path | None = option(None, help="text to gather statistics on", metavar="FILE")
    eval: Path | None = option(None, help="text to search and to prove the budget on", metavar="FILE")
    objective: str = option("decode", help="what to make cheap", choices=("decode", "prefill", "memory"))
    threads: int = option(0, help="threads to use; 0: all that this process may")
    minutes: float = option(10.0, help="time to measure sensitivities for, at most")
    keep_work: bool = option(False, help="keep the folder OUT.work with all measurements")
    json: bool = option(False, help="print everything found as JSON")


def run(options: Options) -> int:
    from hasten.search import document
    from hasten.search.accelerate import accelerate
    from hasten.search.job import Settings

    settings = Settings(
        options.model,
        options.output,
        options.budget,
        options.calibration,
        options.eval,
        options.objective,
        options.threads,
        options.minutes,
        options.keep_work,
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
        show(document.rows(outcome.document))
        print(f"\n{document.headline(outcome.document)}.")
        print(f"artifact: {outcome.output}\nreport:   {outcome.output / 'report.html'}")
    return 0


def show(rows: list[tuple[str, str, str, str]]) -> None:
    """The table in columns, plain."""
    table = [("", "original", "accelerated", "change"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    for number, row in enumerate(table):
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())
        if number == 0:
            print("-" * (sum(widths) + 6))
