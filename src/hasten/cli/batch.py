"""`hasten batch`: answers a file of requests in OpenAI's batch format. Stopped at any moment, it can be continued."""

from __future__ import annotations

import importlib.util
import json as json_module
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hasten
from hasten.cli.cache import Room
from hasten.cli.options import argument, group, option, required
from hasten.cli.progress import Report, reporter
from hasten.cli.serve import NEEDS, SCORE_ROWS, names, served
from hasten.errors import DependencyError

if TYPE_CHECKING:
    from hasten.checkpoint import Model
    from hasten.server.batch_input import Requests
    from hasten.server.batch_output import Results, Summary

HELP = "answer a file of requests in OpenAI's batch format"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id, hasten artifact or demo")
    input: Path = argument(help="requests, one JSON object a line", metavar="INPUT.jsonl")
    output: Path = required("-o", help="file to write, one answer a line", metavar="OUTPUT.jsonl")
    name: str | None = option(None, help="what the requests call the model (default: as it is named here)")
    restart: bool = option(False, help="drop what an earlier run has left, and begin anew")
    context: int | None = option(
        None, help="tokens that prompt and answer may have (default: the model's, at most 4096)"
    )
    max_batch: int = option(16, help="answers computed together")
    cache: Room = group(Room)
    threads: int = option(0, help="0: one a core")
    json: bool = option(False, help="print the summary as JSON")


def run(options: Options) -> int:
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"hasten batch needs {', '.join(missing)}", "pip install 'hasten[serve]'")
    from hasten import checkpoint
    from hasten.server.batch_input import Requests
    from hasten.server.batch_output import FAULT, Results, check_paths

    check_paths(options.input, options.output)
    with reporter() as report:
        requests = Requests(options.input, names(options.model, options.name), report)
        model = checkpoint.open(options.model)
        with Results(options.output, requests, facts(model, options), options.restart) as results:
            if results.complete:
                note(f"{options.output} already holds the answer to every line; --restart answers them again")
                summary = results.summary(results.count, results.completion_tokens, 0.0)
            else:
                summary = answered(model, options, requests, results, report)
    faults = sum(count for status, count in summary.statuses.items() if status >= FAULT)
    show(options, summary)
    if faults:
        note(f"{faults} failed twice by a fault of the engine; the same command tries them again")
    return int(faults > 0)


def facts(model: Model, options: Options) -> dict[str, Any]:
    """What decides the answers, beside the requests. Raises what too large a model or context raises."""
    from hasten.backends.host import active_isa, native_build
    from hasten.checkpoint.files import fingerprint
    from hasten.engine.llm import limits_for

    limits = limits_for(model, budget=options.cache.budget, **sizes(options))
    return {
        "model": fingerprint(model.path),
        "name of the model": names(options.model, options.name)[0],
        "context": limits.context,
        "format of the cache": limits.kv_format,
        "instruction set": active_isa(),
        "build of hasten": f"{hasten.__version__} {native_build()}",
    }


def sizes(options: Options) -> dict[str, Any]:
    """What both LLM and limits_for take by these names."""
    return {
        "context": options.context,
        "max_batch": options.max_batch,
        "threads": options.threads,
        "kv_format": options.cache.kv_format,
        "score_rows": SCORE_ROWS,
    }


def answered(model: Model, options: Options, requests: Requests, results: Results, report: Report) -> Summary:
    from hasten.engine.llm import LLM
    from hasten.server.batch import answer

    if results.count:
        note(f"continuing: {results.count} of {len(requests)} lines are answered already")
    llm = LLM(model, memory=options.cache.budget, **sizes(options), report=report)
    try:
        return answer(llm.make_engine, served(llm, options.model, options.name), requests, results, report)
    except KeyboardInterrupt:
        note(f"{results.count} of {len(requests)} lines are answered; the same command, given again, continues")
        raise


def show(options: Options, summary: Summary) -> None:
    """What was done, to stdout."""
    if options.json:
        print(json_module.dumps({"output": str(options.output), **asdict(summary)}, indent=1))
        return
    statuses = ", ".join(f"{count} with {status}" for status, count in summary.statuses.items())
    tokens = f"{summary.prompt_tokens} tokens of prompts, {summary.completion_tokens} written"
    print(f"{summary.lines} lines: {statuses}; {tokens}")
    print(f"{summary.answered} answered in {summary.seconds:.1f} s, {summary.tokens_per_second:.1f} tokens/s")


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
