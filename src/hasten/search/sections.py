"""What a report tells beside the outcome: what bought what, other text, batch sizes, predictions. Rows for any form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hasten.search import batches, scatter, table
from hasten.search.predict import CLOSE

Json = dict[str, Any]
NOT_CHEAPER = "searched as well; nothing cheaper came of it"
TWINS = "int8-g64 everywhere"
"""A candidate that every search measures, and that loses next to nothing by its format."""


@dataclass(frozen=True)
class Section:
    """A table with its title and a note; `plots` are SVG, for the page only."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    plots: tuple[str, ...] = ()


def sections(document: Json) -> list[Section]:
    """Those that have something to tell."""
    found = [f(document) for f in (contributions, caches, shapes, other, at_batches, predicted)]
    peers = scatter.beside(document)
    if peers:
        note = f"Peers as measured on {document['peers']['machine']}, in a run of their own."
        found.append(Section("Beside other engines", (), [], note, (peers,)))
    return [s for s in found if s.rows or s.plots]


def contributions(document: Json) -> Section:
    part = document["budget"]["parts"][0]
    candidate = next((c for c in document["candidates"] if c["chosen"]), None)
    whole = candidate["estimate"] if candidate else None
    memory = document["objective"] == "memory"
    rows: list[tuple[str, ...]] = []
    for one in document["contributions"]:
        without, nearest = one["without"]["estimate"], one["nearest"] and one["nearest"]["estimate"]
        rows.append(
            (
                f"{one['format']} by {one['method']}",
                str(one["matrices"]),
                f"{one['bytes_saved'] / 1e6:,.2f} MB",
                "" if memory else f"{one['cost_saved'] * 1e6:,.1f}",
                _difference(part, whole, without),
                _difference(part, nearest, whole) if one["nearest"] else "",
            )
        )
    if shape := _shapes_part(document, part):
        rows.insert(0, shape)
    head = ("", "matrices", "bytes saved", "microseconds saved (predicted)", "loss caused", "loss saved by the method")
    note = (
        f"In {part['what']}, on the search's text, of the whole model: loss caused is what goes away where these "
        "matrices alone are as they were; loss saved is what comes where nearest rounding makes the same format. What "
        "is small beside the candidates' intervals is chance."
    )
    if shape:
        note += f" The shape's row: {TWINS} with it and without."
    return Section("What bought what", head, rows, note)


def _shapes_part(document: Json, part: Json) -> tuple[str, ...] | None:
    """What another shape alone bought: the same format everywhere with and without it, measured on the same text."""
    own = next((c for c in document["candidates"] if c["name"] == TWINS), None)
    twin = next((c for c in document["others"] if c["name"].startswith(f"{TWINS}, ")), None)
    if not (document["shape"] and own and twin):
        return None
    memory, name = document["objective"] == "memory", document["shape"]["name"]
    saved = "" if memory else f"{(twin['cost'] - own['cost']) * 1e6:,.1f}"
    lost = _difference(part, own["estimate"], twin["estimate"])
    return (name, "", f"{(twin['bytes'] - own['bytes']) / 1e6:,.2f} MB", saved, lost, "")


def caches(document: Json) -> Section:
    """What the cache of keys and values could be in, and whether it is."""
    found, rows = document["cache"], []
    if found:
        bytes_ = f"{found['bytes_before']:,} to {found['bytes_after']:,}"
        gain = _gain(found["gain"]) if found["gain"] else ""
        rows.append((found["formats"], bytes_, f"{found['loss']:.5f}", gain, found["refused"] or "chosen"))
    head = ("", "bytes a token", "KL divergence, nats", f"{document['objective']} gain", "")
    note = "The loss is the sum of what each layer alone loses; the gain is timed in turn with the cache as it was."
    return Section("Keys and values in the cache", head, rows, note)


def shapes(document: Json) -> Section:
    """Other shapes of the model that a search may start from, and what became of them."""
    ended = (document["shape"] or {}).get("name")
    cost = "bytes" if document["objective"] == "memory" else "time"
    rows = [
        (
            one["name"],
            f"{one['parameters']:.1%}",
            f"{one['cost']:.1%}",
            "" if one["loss"] is None else f"{one['loss']:.4f}",
            "the search ends with it"
            if one["name"] == ended
            else one["refused"] or (NOT_CHEAPER if one.get("searched") else "it promises nothing cheaper"),
        )
        for one in document["shapes"]
    ]
    note = "Each alone, in the model's own formats, on calibration text that it was not fitted to."
    head = ("", "parameters", f"matrices' {cost}", "KL divergence, nats", "")
    return Section("Other shapes", head, rows, note)


def _difference(part: Json, first: float | None, second: float | None) -> str:
    return "" if first is None or second is None else table.loss(part["measure"], first - second)


def other(document: Json) -> Section:
    rows = []
    for one in document["other"]:
        growth = one.get("growth")
        if growth is None:
            rows.append((one["text"], f"{one['tokens']:,}", "output is not a number", "", ""))
            continue
        rows.append(
            (
                one["text"],
                f"{one['tokens']:,}",
                f"{growth['estimate'] * 100:+.2f}% ({growth['low'] * 100:+.2f} to {growth['high'] * 100:+.2f})",
                f"{one['kl_divergence']:.4f}",
                f"{one['top1_agreement'] * 100:.1f}%",
            )
        )
    head = ("", "tokens", "perplexity (95% interval)", "KL divergence, nats", "same top token")
    note = "The chosen candidate beside the original on text of another kind than it was chosen on. No budget is on it."
    return Section("Quality on text of another domain", head, rows, note)


def at_batches(document: Json) -> Section:
    found = document["batches"]
    rows = [
        (
            str(one["batch"]),
            *(f"{rate:,.0f}" for rate in one["decode_tokens_per_second"]),
            _gain(one["decode_gain"]),
            _gain(one["prefill_gain"]),
        )
        for one in found
    ]
    head = ("batch", "decode before, tokens/s", "after", "decode gain", "prefill gain")
    return Section("At other batch sizes", head, rows, batches.turning(found))


def _gain(gain: Json) -> str:
    return f"{gain['estimate']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f})"


def predicted(document: Json) -> Section:
    found = document["predictions"]
    rows = [
        (
            one["name"],
            f"{one['composed']:.3f}",
            f"{one['expected']:.3f}",
            f"{one['corrected']:.3f}",
            f"{one['measured']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
            f"{one['error'] * 100:+.1f}%",
        )
        for one in found
    ]
    head = ("", "composed", "expected", "corrected", "measured (95% interval)", "error")
    near = sum(abs(one["error"]) <= CLOSE for one in found)
    moved = sum(abs(one["corrected"] / one["measured"] - 1) <= CLOSE for one in found)
    known = "" if any(one["expected"] != one["composed"] for one in found) else " (there was no time for these)"
    note = (
        f"Time as a share of the original's in the same rounds. Composed: the original's step less its matrices, plus "
        f"the candidate's, each timed alone. Expected: corrected by whole models in one format each, timed before"
        f"{known}; the error is of this, and {near} of {len(found)} are within {CLOSE:.0%}. Corrected: as far as the "
        f"other candidates of the same rounds moved, known only then, for the machine's state changes how much faster "
        f"anything is; {moved} of {len(found)} are within {CLOSE:.0%}."
    )
    return Section("Times predicted and measured", head, rows, note, (scatter.predictions(document),) if found else ())
