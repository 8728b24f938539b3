"""What a bench beside peers found, as a document, a table and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hasten.bench import machine
from hasten.bench.contenders import Contender, Field

BUSY = 1.3  # limits that vary by more than this say that the processor was shared
DESCRIPTIONS = {
    "prefill": "a prompt of {tokens} tokens, to its first token",
    "decode": "{batch} sequences step together from depth {depth}, {new} steps",
    "depth": "one sequence steps from depth {depth}, {new} steps",
    "serve": "so many clients of the engine's own server, each with one request at a time: prompts of 128 to {tokens} "
    "tokens, {new} new; output tokens a second of all together",
    "ttft-warm": "a prompt of {tokens} tokens to its first token, in a process that is ready",
    "ttft-cold": "from starting the process to the first token of a prompt of {tokens}",
}


def document(
    field: Field,
    results: Sequence[Mapping[str, Any]],
    *,
    source: str,
    random: bool,
    rounds: int,
    threads: int,
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Everything, ready for JSON."""
    work, here = next(iter(field.works.values())), machine.describe()
    cold = next((r for r in results if r["kind"] == "ttft-cold"), None)
    return {
        "machine": {**asdict(here), "instruction_sets": list(here.instruction_sets)},
        "model": {"source": source, "random_weights": random, "parameters": work.parameters},
        "threads": threads or here.cores,
        "rounds": rounds,
        "engines": {
            c.name: {
                "peer": c.peer,
                "version": c.version,
                "bits": c.variant.bits,
                "mix": c.variant.mix,
                "bytes_ratio": c.prepared.step_bytes / _ours(field, c.variant.bits).prepared.step_bytes,
                "step_bytes": c.prepared.step_bytes,
                "file_bytes": c.prepared.file_bytes,
                "peak_resident": cold["engines"].get(c.name, {}).get("peak", 0) if cold else 0,
            }
            for c in field.contenders
        },
        "missing": field.missing,
        "left_out": list(left_out),
        "workloads": list(results),
    }


def _ours(field: Field, bits: int) -> Contender:
    """The hasten that is compared with peers of so many bits, or the first."""
    ours = [c for c in field.contenders if c.peer == "hasten"]
    return next((c for c in ours if c.variant.bits == bits), ours[0])


def cell(figures: Mapping[str, Any]) -> str:
    if error := figures.get("error"):
        return "not measured" if error.startswith("not measured") else "failed"
    if "median" not in figures:
        return "-"
    spread = f" ({number(figures['low'])}-{number(figures['high'])})" if figures["low"] != figures["high"] else ""
    return f"{number(figures['median'])}{spread}"


def number(value: float) -> str:
    """Three digits at least, and no more behind the point than they need."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(figures: Mapping[str, Any]) -> str:
    return f"{figures['share_of_limit']:.0%}" if "share_of_limit" in figures else ""


def latencies(figures: Mapping[str, Any]) -> str:
    """Of a server: how long its clients wait, and what is left of its engine's speed."""
    if "latency_ms" not in figures:
        return ""
    waits = (("first token", "ttft_p50"), ("p99", "ttft_p99"), ("between tokens", "itl_p50"), ("p99", "itl_p99"))
    shown = ", ".join(f"{label} {number(figures['latency_ms'][key])}" for label, key in waits)
    alone = figures.get("of_engine_alone")
    return f"; {shown} ms" + (f"; {alone['median']:.0%} of the engine alone" if alone else "")


def gaps(workload: Mapping[str, Any], ours: str, peer: str) -> str:
    """How many times as long the peer's longest waits between tokens are."""
    found = (workload.get("itl_p99_ratios") or {}).get(ours, {}).get("peers", {}).get(peer)
    return f", p99 between tokens {times(found)} as short" if found else ""


def times(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    spread = f" ({found['low']:.2f}-{found['high']:.2f})" if found["low"] != found["high"] else ""
    return f"{found['median']:.2f}x{spread}"


def rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each workload and engine: figures, share of the limit, and how much faster each hasten is."""
    made = []
    for workload in found["workloads"]:
        for name, figures in workload["engines"].items():
            ratios = [(ours, r["peers"].get(name), r["best"]) for ours, r in workload["ratios"].items()]
            shown = [(ours, value, best) for ours, value, best in ratios if value]
            row = {
                "workload": workload["name"],
                "engine": name,
                "figure": f"{cell(figures)} {figures.get('unit', '')}{latencies(figures)}".strip(),
                "of limit": percent(figures),
                "set to": setting(figures),
                "hasten is": "; ".join(
                    f"{times(value)}{' *' if best == name else ''}{gaps(workload, ours, name)}"
                    f"{f' [{ours[7:]}]' if len(shown) > 1 else ''}"
                    for ours, value, best in shown
                ),
            }
            made.append(row)
    return made


def setting(figures: Mapping[str, Any]) -> str:
    """What the engine was set to, and how it was asked where that was not by its own tool."""
    parts = [f"{k} {v}" for k, v in (figures.get("choice") or {}).items() if k != "via"]
    return ", ".join(parts + ["C interface"] * (figures.get("via") == "C interface"))


def table(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [head(found), ""]
    shown = rows(found)
    widths = {key: max(len(key), *(len(row[key]) for row in shown)) for key in shown[0]}
    lines.append("  ".join(key.ljust(width) for key, width in widths.items()).rstrip())
    last = ""
    for row in shown:
        first = row["workload"] if row["workload"] != last else ""
        last = row["workload"]
        values = {**row, "workload": first}
        lines.append("  ".join(values[key].ljust(width) for key, width in widths.items()).rstrip())
    lines += ["", "* the best peer of that workload. A range is of all rounds, a ratio's of pairs of neighbours.", ""]
    lines += [f"{name}: {facts(engine)}" for name, engine in found["engines"].items()]
    lines += notes(found)
    return "\n".join(lines)


def head(found: Mapping[str, Any]) -> str:
    model, here = found["model"], found["machine"]
    weights = "random weights" if model["random_weights"] else "its own weights"
    rounds = "one round" if found["rounds"] == 1 else f"{found['rounds']} rounds"
    return (
        f"{name_of(found)}: {model['parameters'] / 1e6:,.1f}M parameters, {weights}. {here['cpu']}, "
        f"{found['threads']} threads, {here['instruction_set']}; {rounds}. {limits(found)}"
    )


def title(found: Mapping[str, Any]) -> str:
    """The model, hasten's formats, and what was measured: no two sections are called the same."""
    formats = [name.removeprefix("hasten ") for name, e in found["engines"].items() if e["peer"] == "hasten"]
    return f"{name_of(found)} in {', '.join(formats)}: {', '.join(w['name'] for w in found['workloads'])}"


def name_of(found: Mapping[str, Any]) -> str:
    """The model as it is shown: no paths of the machine that measured."""
    return Path(found["model"]["source"]).name


def limits(found: Mapping[str, Any]) -> str:
    """The spread of the machine's limits over the whole run."""
    measured = [one for workload in found["workloads"] for one in workload["limits"]]
    parts = []
    for key, name, unit in (
        ("memory_read_gbs", "memory read", "GB/s"),
        ("int8_gmacs", "int8", "GMAC/s"),
        ("bf16_gmacs", "bf16", "GMAC/s"),
    ):
        values = [one[key] for one in measured]
        parts.append(f"{name} {number(min(values))}-{number(max(values))} {unit}")
    return f"Limits measured along the way: {', '.join(parts)}."


def facts(engine: Mapping[str, Any]) -> str:
    mib = {key: engine[key] / 2**20 for key in ("step_bytes", "file_bytes", "peak_resident")}
    peak = f", peak of its process {mib['peak_resident']:,.0f} MiB" if engine["peak_resident"] else ""
    mix = "its own mix of types, " if engine["mix"] == "default" else ""
    return (
        f"{engine['version']}, {mix}{engine['bytes_ratio']:.2f} of hasten's bytes: a step reads "
        f"{mib['step_bytes']:,.1f} MiB of weights, its file has {mib['file_bytes']:,.1f}{peak}"
    )


def notes(found: Mapping[str, Any]) -> list[str]:
    """Who and what is missing, and why."""
    lines = [f"{m['peer']}: {m['reason']}" for m in found["missing"]]
    if busy := [w["name"] for w in found["workloads"] if spread_of_limits(w) > BUSY]:
        lines.append(
            f"the machine was busy with other work during {', '.join(busy)}: its limits varied by more than "
            f"{BUSY:g} times, so these figures, and ratios to engines that bear company badly, may not repeat"
        )
    for workload in found["workloads"]:
        lines += [f"{workload['name']}, {n}: {f['error']}" for n, f in workload["engines"].items() if f.get("error")]
    if found["left_out"]:
        lines.append(f"longer than the model's context: {', '.join(found['left_out'])}")
    return lines


def spread_of_limits(workload: Mapping[str, Any]) -> float:
    """How many times the lowest measurement of the limit of products goes into the highest, over the rounds."""
    rates: list[float] = [one["int8_gmacs"] for one in workload["limits"]]
    return max(rates) / min(rates)


def markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """docs/benchmarks.md from the reports of one or more benches."""
    parts = [
        "# Benchmarks",
        "",
        "Written by `hasten bench MODEL --against ... --output DIR` and "
        "`python -m hasten.bench.against_report DIR/report.json ...`; do not edit.",
        "",
        "Engines take turns within a round, so a ratio compares neighbours in time; it says how much faster hasten is. "
        "Each figure is the median over rounds with the lowest and highest. The share of the limit holds the least "
        "time for the engine's own bytes or products, whichever takes longer (of a prompt: its products), against the "
        "best of the machine's limits measured in the same rounds. Settings that a peer offers were tried first, twice "
        "each, and the fastest taken; what has none is as it sets itself. `*` marks the best peer.",
        "",
        "Without VNNI the int8 limit is that of bytes multiplied, widened and added, as any weights of 8 bits need. "
        "Weights of 4 bits and fewer need less, and may pass it: 1.6 times is what their instructions would allow.",
    ]
    for found in documents:
        parts += ["", f"## {title(found)}", "", head(found), ""]
        kinds = {w["kind"]: DESCRIPTIONS[w["kind"]].format(**w) for w in found["workloads"]}
        parts += [f"- `{kind}`: {text}" for kind, text in kinds.items() if not kind.startswith(("prefill", "de"))]
        shown = rows(found)
        parts += ["", f"| {' | '.join(shown[0])} |", f"|{'---|' * len(shown[0])}"]
        parts += [f"| {' | '.join(row.values())} |" for row in shown]
        parts += ["", *(f"- {name}: {facts(engine)}" for name, engine in found["engines"].items())]
        parts += [f"- {line}" for line in notes(found)]
    return "\n".join(parts) + "\n"


def main() -> None:
    import argparse
    import json

    parser = argparse.ArgumentParser(description="Markdown from the report.json files of benches beside peers")
    parser.add_argument("reports", nargs="+", type=Path)
    print(markdown([json.loads(path.read_text()) for path in parser.parse_args().reports]), end="")


if __name__ == "__main__":
    main()
