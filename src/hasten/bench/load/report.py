"""What a load found, as a table, Markdown, plots and a line of JSON for each request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.bench.load import chart, summary
from hasten.bench.load.client import Record
from hasten.bench.load.run import Result
from hasten.errors import OutputError

TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2e": "end to end",
}
COLUMNS = ("mean", "p50", "p90", "p99", "max")
SLOW_CLIENT = 0.1  # of the median time to first token: a client later than this spoils what it measures
LEAST_LAG_MS = 5.0
CACHED = 0.1  # of prompts' tokens: more than this makes figures of new prompts look better


def rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each latency, and for the client's own lag."""
    each = {f"{TITLES[name]}, ms": values for name, values in found["latency_ms"].items()}
    each |= {
        "client: connecting, ms": found["client"]["connect_ms"],
        "client: sent late by, ms": found["client"]["send_lag_ms"],
        "client: its loop late by, ms": found["client"]["loop_lag_ms"],
    }
    return [
        {"": name, **{column: number(values[column]) for column in COLUMNS}} for name, values in each.items() if values
    ]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def head(found: Mapping[str, Any]) -> list[str]:
    """What was asked of whom, and the counts and rates, a line each."""
    target, load, counts, rates = found["target"], found["load"], found["requests"], found["rates"]
    tokens, goodput = found["tokens"], found.get("goodput")
    planned = f" of {counts['planned']}" if counts["planned"] not in (None, counts["sent"]) else ""
    lines = [
        f"{target['url']}{target['endpoint']}, model {target['model']}: {load['kind']}, {load['lengths']}",
        f"{counts['sent']}{planned} requests sent in {found['seconds']:.1f} s: {counts['completed']} completed, "
        f"{counts['refused']} refused, {counts['failed']} failed, {counts['unfinished']} unfinished"
        + (" (interrupted)" if found["interrupted"] else ""),
        f"{rates['requests_per_second']:.2f} requests/s, {number(rates['output_tokens_per_second'])} output tokens/s, "
        f"{number(rates['total_tokens_per_second'])} tokens/s with prompts; "
        f"{tokens['prompt']:,} prompt tokens ({tokens['cached']:,} from a cache), {tokens['output']:,} made; "
        f"at most {found['client']['most_under_way']} under way",
    ]
    if goodput:
        limits = ", ".join(f"{name} {number(limit)} ms" for name, limit in goodput["limits_ms"].items())
        lines.append(
            f"goodput: {goodput['requests_per_second']:.2f} requests/s, {goodput['good']} of {counts['sent']} "
            f"({goodput['share']:.1%}) within {limits}"
        )
    return lines


def notes(found: Mapping[str, Any]) -> list[str]:
    """What to know before believing the figures."""
    tokens, own = found["tokens"], found["client"]
    lines = []
    for one in found["errors"]:
        hint = f"; {one['with_retry_after']} with Retry-After" if one["outcome"] == "refused" else ""
        first = one["first"]
        lines.append(f"{one['outcome']}: {one['error']}, {one['count']} times{hint}. Request {first['request']}: ")
        lines[-1] += first["detail"] or "nothing said"
    if tokens["cached"] > CACHED * tokens["prompt"]:
        lines.append(
            f"{tokens['cached'] / tokens['prompt']:.0%} of the prompts' tokens came from a cache, so first tokens came "
            "sooner than to new prompts; the same --seed sends the same prompts again, another one sends others"
        )
    if tokens["counted_by_chunks"]:
        lines.append(f"{tokens['counted_by_chunks']} answers came without usage: their tokens are counted by chunks")
    if tokens["short_answers"]:
        lines.append(f"{tokens['short_answers']} answers are shorter than asked ({tokens['output']}/{tokens['asked']})")
    if tokens["without_text"]:
        lines.append(f"{tokens['without_text']} answers held no text: they have no time to first token")
    if tokens["per_chunk"] > 1.2:
        lines.append(f"a chunk holds {tokens['per_chunk']:.1f} tokens: inter-token latency is that between chunks")
    if found["load"]["left_out"]:
        lines.append(f"{found['load']['left_out']} requests of the trace are longer than the context and were left out")
    first_token = found["latency_ms"]["ttft"]
    for name in ("send_lag_ms", "loop_lag_ms"):
        lag = own[name]
        if lag and first_token and lag["p99"] > max(LEAST_LAG_MS, SLOW_CLIENT * first_token["p50"]):
            lines.append(
                f"the client itself was slow ({name} p99 {number(lag['p99'])} ms, {own['cpu_share']:.0%} of a core): "
                "latencies are overstated"
            )
    return lines


def table(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [*head(found), ""]
    shown = rows(found)
    width = max(len(row[""]) for row in shown) if shown else 0
    if shown:
        lines.append(" " * width + "".join(f"{column:>11}" for column in COLUMNS))
    lines += [row[""].ljust(width) + "".join(f"{row[column]:>11}" for column in COLUMNS) for row in shown]
    said = notes(found)
    return "\n".join([*lines, *([""] if said else []), *said])


def markdown(found: Mapping[str, Any]) -> str:
    shown = rows(found)
    lines = ["# Load on a server", "", "Written by `hasten bench-serve ... --output DIR`; docs/load.md defines it.", ""]
    lines += [f"- {_plain(line)}" for line in head(found)]
    if shown:
        lines += ["", f"| {' | '.join(shown[0])} |", f"|---|{'--:|' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(row.values())} |" for row in shown]
    lines += ["", *(f"- {_plain(line)}" for line in notes(found))]
    return "\n".join(lines).rstrip() + "\n"


def _plain(line: str) -> str:
    """A server's words as text: no markup of theirs."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in line)


def request_lines(result: Result) -> Iterator[str]:
    """A JSON line for each request; times in seconds from the load's start, latencies in seconds."""
    for record in result.records:
        yield json.dumps(_request(record, result.start)) + "\n"


def _request(record: Record, start: float) -> dict[str, Any]:
    def since(value: float | None) -> float | None:
        return None if value is None else round(value - start, 6)

    return {
        "request": record.number,
        "outcome": record.outcome,
        "status": record.status,
        "error": record.error,
        "scheduled": since(record.scheduled),
        "started": since(record.started),
        "connected": since(record.connected),
        "finished": since(record.finished),
        "prompt_tokens": summary.prompt_tokens(record),
        "asked": record.new,
        "output_tokens": summary.output_tokens(record),
        "finish_reason": record.finish_reason,
        "ttft": summary.ttft(record),
        "tpot": summary.tpot(record),
        "chunks": [since(at) for at in record.chunks],
    }


def write(found: Mapping[str, Any], result: Result, folder: Path) -> list[Path]:
    """report.json, report.md, report.svg and requests.jsonl. Raises OutputError."""
    contents: dict[str, Sequence[str] | Iterator[str]] = {
        "report.json": [json.dumps(found, indent=1) + "\n"],
        "report.md": [markdown(found)],
        "report.svg": [chart.charts(found, result)],
        "requests.jsonl": request_lines(result),
    }
    made = []
    for name, parts in contents.items():
        path = folder / name
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(parts)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
        made.append(path)
    return made
