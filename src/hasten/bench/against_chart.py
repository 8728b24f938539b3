"""The plots of a bench beside peers: how much faster hasten is than the best peer, and both beside the limit."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.bench.chart import Bars, bar_chart, stack

WIDTH = 1080


def charts(found: Mapping[str, Any]) -> str:
    """One SVG from a document of against_report."""
    names = [name for name, engine in found["engines"].items() if engine["peer"] == "hasten"]
    drawn = [_ratios(found, names), *(_shares(found, name) for name in names)]
    return stack([chart for chart in drawn if chart])


def write(found: Mapping[str, Any], path: Path) -> list[Path]:
    """The SVG at `path`, and a PNG beside it where there is something that can draw it. Returns what was written."""
    path.write_text(charts(found), encoding="utf-8")
    picture = path.with_suffix(".png")
    if importlib.util.find_spec("cairosvg"):
        import cairosvg

        cairosvg.svg2png(url=str(path), write_to=str(picture), background_color="white", scale=2)
    elif shutil.which("rsvg-convert"):
        command = ["rsvg-convert", "--background-color", "white", "--zoom", "2", "-o", str(picture), str(path)]
        subprocess.run(command, check=False, capture_output=True)
    return [p for p in (path, picture) if p.exists()]


def _ratios(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """Bars for each hasten, over the workloads that a peer has run too."""
    workloads = [w for w in found["workloads"] if any(w["ratios"][name]["best"] for name in names)]
    if not workloads:
        return ""
    best = {name: [_best(w, name) for w in workloads] for name in names}
    series = [
        Bars(
            name,
            [ratio["median"] if ratio else None for ratio in ratios],
            [(ratio["low"], ratio["high"]) if ratio else None for ratio in ratios],
        )
        for name, ratios in best.items()
    ]
    labels = [w["name"] for w in workloads]
    title = f"Times as fast as the best peer, {_source(found)}"
    return bar_chart(title, labels, series, unit="times", width=WIDTH, reference=1.0)


def _best(workload: Mapping[str, Any], name: str) -> Mapping[str, float] | None:
    found = workload["ratios"][name]
    return found["peers"][found["best"]] if found["best"] else None


def _shares(found: Mapping[str, Any], name: str) -> str:
    """Share of the limit of one hasten and of every peer it is compared with."""
    workloads = [w for w in found["workloads"] if "share_of_limit" in w["engines"].get(name, {})]
    if not workloads:
        return ""
    peers = dict.fromkeys(peer for w in workloads for peer in w["ratios"][name]["peers"])
    series = [
        Bars(
            engine,
            [
                100 * w["engines"][engine]["share_of_limit"] if "share_of_limit" in w["engines"][engine] else None
                for w in workloads
            ],
        )
        for engine in (name, *peers)
    ]
    title = f"Share of the machine's limit, {_source(found)}"
    return bar_chart(title, [w["name"] for w in workloads], series, unit="%", width=WIDTH, reference=100.0)


def _source(found: Mapping[str, Any]) -> str:
    return Path(found["model"]["source"]).name
