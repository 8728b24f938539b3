"""`hasten trials`: whole candidates that searches on this machine have measured, and their recipes."""

from __future__ import annotations

import json as json_module
from dataclasses import dataclass
from typing import Any

from hasten.cli.options import argument, option
from hasten.errors import InputError

NOTE = "measured by the searches, on the text that they chose by; what was proven is in an artifact's report.md"
HELP = "list what searches have measured, or show one candidate's recipe"


@dataclass(frozen=True)
class Options:
    id: str | None = argument(default=None, help="of a candidate, or its beginning: its recipe is shown")
    model: str | None = option(None, help="only of models whose name holds this", metavar="TEXT")
    limit: int = option(50, help="the newest so many", metavar="N")
    json: bool = option(False, help="print JSON")


def run(options: Options) -> int:
    from hasten.search import history

    if options.limit < 1:
        raise InputError(f"limit is {options.limit}, must be 1 or more")
    path = history.place()
    if not path.exists():
        if options.id is not None:
            raise InputError(f"no trial has the id '{options.id}': nothing was measured here yet")
        print("[]" if options.json else "no search has finished here yet: `hasten accelerate` makes them")
        return 0
    with history.History(path) as known:
        if options.id is not None:
            show(known.get(options.id), options.json)
            return 0
        found = known.find(options.model, options.limit)
    if options.json:
        print(json_module.dumps([{k: v for k, v in row.items() if k != "choices"} for row in found], indent=1))
    else:
        print(f"{table(found)}\n{NOTE}" if found else "no trial matches")
    return 0


def show(one: dict[str, Any], as_json: bool) -> None:
    """A candidate: its facts as comments, and the recipe that `hasten compress` takes."""
    import yaml

    if as_json:
        print(json_module.dumps(one, indent=1))
        return
    facts = (
        ("candidate", f"{one['name']}{state(one)}, of {one['at'][:16].replace('T', ' ')}"),
        ("model", one["model"]),
        ("searched for", f"{one['objective']} within {one['budget']}"),
        ("machine", f"{one['machine']}, {one['threads']} threads; hasten {one['version']}"),
        ("measured", f"{losses(one)}; {one['bytes'] / 1e6:,.2f} MB of matrices{speeds(one)}"),
    )
    print("\n".join(f"# {name}: {text}" for name, text in facts))
    beside = {key: found for key in ("structure", "cache") if (found := one["figures"].get(key))}
    tensors = [{"match": name, "format": c[0], "method": c[1]} for name, c in one["choices"].items()]
    print(yaml.safe_dump({**beside, "tensors": tensors}, sort_keys=False), end="")


def state(one: dict[str, Any]) -> str:
    return " (chosen)" if one["chosen"] else " (fits)" if one["fits"] else ""


def losses(one: dict[str, Any]) -> str:
    from hasten.search.table import loss

    names = {"agree": "other tokens", "task": "lost"}
    return ", ".join(
        f"{names.get(r['measure'], r['measure'])} {loss(r['measure'], r['estimate'])}"
        for r in one["figures"]["readings"]
    )


def speeds(one: dict[str, Any]) -> str:
    gains = one["figures"]["speedup"]
    return "".join(f", {part} {gains[part]['estimate']:.2f}x" for part in ("decode", "prefill")) if gains else ""


def table(found: list[dict[str, Any]]) -> str:
    """In columns, plain."""
    head = ("id", "when", "model", "objective", "budget", "candidate", "loss", "MB", "decode", "prefill", "state")
    rows = [head]
    for one in found:
        gains = one["figures"]["speedup"] or {}
        shown = [f"{gains[part]['estimate']:.2f}x" if gains else "" for part in ("decode", "prefill")]
        name = one["model"].rstrip("/").split("/")[-1]
        rows.append(
            (
                one["id"][:8],
                one["at"][:16].replace("T", " "),
                name,
                one["objective"],
                one["budget"],
                one["name"],
                losses(one),
                f"{one['bytes'] / 1e6:,.2f}",
                *shown,
                state(one).strip(" ()"),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
