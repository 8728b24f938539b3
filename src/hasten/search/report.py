"""Writes what a search found beside the artifact: report.html (self-contained), report.md, report.json, recipe.yaml."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hasten.errors import unwritable
from hasten.search import plots, sections, table
from hasten.search.sections import Section
from hasten.search.texts import NEGLIGIBLE

Json = dict[str, Any]


def write(folder: Path, document: Json, recipe: Json) -> None:
    """`recipe`: that made the artifact. Raises OutputError where the folder cannot take them."""
    files = {
        "report.json": json.dumps(document, indent=1) + "\n",
        "report.md": markdown(document),
        "report.html": html(document),
        "recipe.yaml": "# What the search chose; `hasten compress` takes it. It packs block by block: other bytes.\n"
        + yaml.safe_dump(recipe, sort_keys=False),
    }
    for name, content in files.items():
        try:
            (folder / name).write_text(content, encoding="utf-8")
        except OSError as error:
            raise unwritable(folder / name, error) from None


def markdown(document: Json) -> str:
    rows = table.rows(document)
    lines = ["| | original | accelerated | |", "|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    counts: dict[str, int] = {}
    for one in document["tensors"]:
        counts[one["format"]] = counts.get(one["format"], 0) + 1
    formats = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
    return "\n".join(
        [
            f"# {document['model']}, accelerated by hasten",
            "",
            table.headline(document) + ".",
            "",
            *lines,
            "",
            f"Matrices: {formats}.",
            "",
            *(f"- {line}" for line in facts(document)),
            "",
            *(line for one in sections.sections(document) if one.rows for line in _told(one)),
        ]
    )


def facts(document: Json) -> list[str]:
    """What was measured, on what."""
    machine, limits, timed, texts = (document[part] for part in ("machine", "limits", "timed", "texts"))
    lines = [
        f"Model: {document['model']} ({document['architecture']}, {document['parameters']:,} parameters).",
        f"Machine: {machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}; "
        f"memory read {limits['memory_read_gbs']:.1f} GB/s, int8 {limits['int8_gmacs']:.0f} and bf16 "
        f"{limits['bf16_gmacs']:.0f} GMAC/s, measured in the same run.",
        f"Speeds: batch {timed['batch']}, prompt {timed['prompt']}, {timed['new']} new tokens, original and "
        f"accelerated in turn; gains are medians over rounds with their 95% interval.",
    ]
    if document["after"]["fits_cache"]:
        lines.append("The accelerated weights fit the cache, so memory is no limit and decode's share may pass 100%.")
    for name in ("calibration", "search", "final"):
        lines.append(f"Text for {name}: {texts[name]['source']}, {texts[name]['tokens']:,} tokens.")
    proof = document["verdict"]["attempts"]
    lines.append(
        f"Proof: {proof[-1]['tokens']:,} tokens in windows of {document['context']}, {novelty(document['seen'])}, "
        f"both models on the same tokens; attempt {len(proof)}, whose loss has a {proof[-1]['level']:.0%} interval."
    )
    if len(proof) > 1:
        lines.append(
            "Each attempt takes text of its own. The first asks for a 95% interval within the budget, later ones for "
            "99%, since who tries again is more likely to succeed by luck."
        )
    return lines + [str(note) for note in document["notes"]]


def novelty(seen: float) -> str:
    """What may be said of the text of the proof."""
    if seen <= NEGLIGIBLE:
        return "which nothing had seen before"
    return f"up to {seen:.1%} of which also stand in the other texts"


def html(document: Json) -> str:
    tiles = "".join(f"<div class=tile><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in _tiles(document))
    before_after = _table(("", "original", "accelerated", "change"), table.rows(document))
    axes = ("bytes",) if document["objective"] == "memory" else ("cost", "bytes")
    deep = max(t["block"] for t in document["tensors"]) > 12
    figures = [f"<figure>{plots.candidates(document, axis)}</figure>" for axis in axes]
    first, *others = figures if deep else [f"<figure>{plots.model_map(document)}</figure>", *figures]
    rest = "".join(others)
    shown = [
        f"<div class=tiles>{tiles}</div>",
        f"<section><h2>Before and after</h2>{before_after}</section>",
        f"<section class=pair><figure>{plots.speeds(document)}</figure>{first}</section>",
        f"<section class=pair>{rest}</section>",
        f"<section><figure class=wide>{plots.model_map(document)}</figure></section>" if deep else "",
        f"<section><h2>Candidates measured whole</h2>{_candidates(document)}"
        "<p class=note>On the search's text. A candidate fits if it will stay within the budget on the final text "
        "nineteen times in twenty.</p></section>",
        *(_section(one) for one in sections.sections(document)),
        _refused(document),
        f"<section><h2>Most sensitive matrices</h2>{_sensitive(document)}"
        "<p class=note>Divergence of the whole model's output, in nats a token, where that matrix alone changes: "
        "measured on the calibration text, or scaled from a neighbour that was.</p></section>",
        "<section><h2>How it was measured</h2><ul>"
        + "".join(f"<li>{escape(line)}</li>" for line in facts(document))
        + f"</ul>{_durations(document)}</section>",
    ]
    title = escape(f"{document['model'].rstrip('/').split('/')[-1]}, accelerated by hasten")
    head = f"<header><h1>{title}</h1><p>{escape(table.headline(document))}.</p></header>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>{head}\n"
        + "\n".join(shown)
        + "\n</main></body></html>\n"
    )


def _section(one: Section) -> str:
    plots = "".join(f"<figure>{plot}</figure>" for plot in one.plots)
    rows = _table(one.head, one.rows) if one.rows else ""
    note = f"<p class=note>{escape(one.note)}</p>" if one.note else ""
    return f"<section><h2>{escape(one.title)}</h2>{plots}{rows}{note}</section>"


def _told(one: Section) -> list[str]:
    """A section in Markdown."""
    lines = [f"## {one.title}", ""]
    if one.rows:
        lines += ["| " + " | ".join(one.head) + " |", "|---" * len(one.head) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in one.rows]
        lines.append("")
    return [*lines, one.note, ""] if one.note else lines


def _tiles(document: Json) -> list[tuple[str, str]]:
    before, after, gain = document["before"], document["after"], document["speedup"]
    proof = document["verdict"]["attempts"][-1]
    pairs = zip(document["budget"]["parts"], proof["readings"], strict=True)
    return [
        ("decode speed", f"{gain['decode']['estimate']:.2f}x"),
        ("prefill speed", f"{gain['prefill']['estimate']:.2f}x"),
        ("size on disk", f"{after['bytes_on_disk'] / before['bytes_on_disk']:.0%}"),
        *(
            (
                f"{part['what']} (budget {part['text'] if part['limit'] is not None else 'none'})",
                table.loss(part["measure"], reading["estimate"]),
            )
            for part, reading in pairs
        ),
    ]


def _candidates(document: Json) -> str:
    parts = document["budget"]["parts"]

    def losses(one: Json) -> list[str]:
        return [_with_ends(part["measure"], reading) for part, reading in zip(parts, one["readings"], strict=True)]

    def speed(one: Json, part: str) -> str:
        return f"{one['speedup'][part]['estimate']:.2f}x" if one["speedup"] else ""

    rows = [
        (
            one["name"],
            *losses(one),
            f"{one['bytes'] / 1e6:,.2f} MB",
            f"{one['cost'] / one['cost_of_original']:.2f}" if one["cost_of_original"] else "",
            speed(one, "prefill"),
            speed(one, "decode"),
            "chosen" if one["chosen"] else "fits" if one["fits"] else "",
        )
        for one in document["candidates"]
    ]
    heads = [f"{part['what']} (95% interval)" for part in parts]
    return _table(("", *heads, "matrices", "predicted cost", "prefill", "decode", ""), rows)


def _with_ends(measure: str, reading: Json) -> str:
    if None in (reading["estimate"], reading["low"], reading["high"]):
        return "output is not a number"
    ends = [table.loss(measure, reading[end], unit=False) for end in ("low", "high")]
    return f"{table.loss(measure, reading['estimate'])} ({ends[0]} to {ends[1]})"


def _refused(document: Json) -> str:
    if not document["refused"]:
        return ""
    rows = [
        (
            " x ".join(map(str, one["shape"])),
            one["format"],
            f"{one['seconds'] * 1e6:,.1f}",
            f"{one['original_seconds'] * 1e6:,.1f} ({one['original']})",
        )
        for one in document["refused"]
    ]
    shown = _table(("shape", "format", "microseconds", "as it was"), rows)
    return f"<section><h2>Refused: not faster here</h2>{shown}</section>"


def _sensitive(document: Json) -> str:
    losses = []
    for one in document["tensors"]:
        by = {c["format"]: c["loss"] for c in one["choices"]}
        known = [by.get(f) for f in ("int8-g64", "int4-g64", "codebook4-g64")]
        losses.append((by.get("int4-g64") or 0.0, one, known))
    top = sorted(losses, key=lambda item: -item[0])[:10]
    rows = [
        (one["name"], *(f"{v:.2g}" if v is not None else "" for v in known), one["format"]) for _, one, known in top
    ]
    return _table(("", "int8-g64", "int4-g64", "codebook4-g64", "chosen"), rows)


def _durations(document: Json) -> str:
    total = sum(document["seconds"].values())
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in document["seconds"].items())
    return f"<p class=note>The search took {total:.0f} s: {escape(parts)}.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #17202e; --soft: #5b6675; --line: #e2e6ec; }
@media (prefers-color-scheme: dark) {
  :root { --page: #10141b; --card: #181e28; --ink: #e6eaf1; --soft: #97a3b4; --line: #2a3341; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 12px; }
header p { color: var(--soft); margin: 0 0 24px; max-width: 80ch; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px; }
section { margin-top: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 16px; }
.tile b { display: block; font-size: 28px; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 20px; }
figure { margin: 0; overflow-x: auto; } svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.wide svg { max-width: none; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th, td:last-child { white-space: normal; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
.note { color: var(--soft); margin: 12px 0 0; } ul { margin: 0; padding-left: 20px; }
"""
