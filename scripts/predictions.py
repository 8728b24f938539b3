#!/usr/bin/env python3
"""Decode times that a search predicts of whole candidates, beside what they take: table, JSON and plot.

    python scripts/predictions.py MODEL --mixtures 12 --output build/predictions

Predictions are made as `hasten accelerate` makes them: kernels timed alone, corrected by whole models in one format
each, and by the others of the same rounds. Mixtures, each matrix in a format drawn at random, are timed in turn with
the original.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from hasten.search import cost, predict, prove, scatter, whole
from hasten.search.candidates import tensors
from hasten.search.job import CONTENDERS, Settings, prepare
from hasten.search.refine import Space
from hasten.search.trials import Trials

ROUNDS = 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mixtures", type=int, default=12)
    parser.add_argument("--formats", default="int8-g64,int4-g32,int4-g64,codebook4-g64", help="that are mixed")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/predictions"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(options.model, options.output / "none", calibration=options.calibration, eval=options.eval)
    job = prepare(settings, lambda *_: None, lambda note: print(f"note: {note}", file=sys.stderr))
    wanted = options.formats.split(",")
    found = [
        replace(t, choices=tuple(c for c in t.choices if c.is_original or c.format in wanted))
        for t in tensors(job.graph, job.original)
    ]
    with tempfile.TemporaryDirectory() as folder, Trials(Path(folder) / "work", False) as trials:
        times = cost.measure(found, job.objective, job.threads, trials, job.kernels, job.report)
        alone = [cost.costs(t, job.objective, times) for t in found]
        known = whole.measure(job, found, alone, trials)
    space = Space(found, known.scaled(found, alone), alone, whole=known)
    print(f"{known.seconds * 1e6:.0f} us a step; seconds in the model for one alone: ", end="")
    print(", ".join(f"{name} {value:.2f}" for name, value in known.scale.items()))
    draw = np.random.default_rng(0)
    tried = []
    for number in range(1, options.mixtures + 1):
        choices = {t.name: t.choices[draw.integers(1, len(t.choices)) if t.linears else 0] for t in found}
        tried.append(SimpleNamespace(name=f"mixture {number}", choices=choices, cost=space.cost(choices)))
    runs, speeds = {}, {}
    for start in range(0, len(tried), CONTENDERS):
        some = tried[start : start + CONTENDERS]
        run, timed = prove.timed(job, [whole.rounded(job, formats_of(one.choices)) for one in some], ROUNDS)
        runs |= {one.name: run for one in some}
        speeds |= {one.name: own for one, own in zip(some, timed, strict=True)}
    refiner = SimpleNamespace(space=space, tried=tried)
    rows = [{**asdict(p), "error": p.error} for p in predict.predictions(refiner, job.objective, runs, speeds)]
    (options.output / "predictions.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.output / "predictions.svg").write_text(scatter.predictions({"predictions": rows}))
    print("| | composed | expected | corrected | measured (95% interval) | error |\n|---|---|---|---|---|---|")
    for row in rows:
        shown = f"{row['measured']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        guesses = " | ".join(f"{row[key]:.3f}" for key in ("composed", "expected", "corrected"))
        print(f"| {row['name']} | {guesses} | {shown} | {row['error']:+.1%} |")
    before = sum(abs(row["error"]) <= predict.CLOSE for row in rows)
    after = sum(abs(row["corrected"] / row["measured"] - 1) <= predict.CLOSE for row in rows)
    print(f"of {len(rows)} within {predict.CLOSE:.0%}: {before} as expected, {after} as corrected")
    return 0


def formats_of(choices):
    return {name: c.format for name, c in choices.items() if not c.is_original}


if __name__ == "__main__":
    raise SystemExit(main())
