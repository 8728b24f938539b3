#!/usr/bin/env python3
"""Quality of formats and methods at their bytes, beside llama.cpp's types made by its own tools: table, JSON and plot.

    python scripts/quality.py MODEL --own int4-g32:clip,int4-g32:gptq --types Q4_0,Q4_K --output build/quality

Every candidate is measured against its own engine's original: perplexity and KL divergence on the same windows of
text. llama.cpp reads the GGUF that hasten writes (f16) and quantises it itself: "+imatrix" after a type's name stands
for its importance matrix, made by its tool of the same calibration text, ":pure" for head and embedding of that type
too. Bytes are those of all matrices, head included, per weight of the original. --own also takes recipes (*.yaml).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten import checkpoint
from hasten.bench import contenders
from hasten.bench.peers import llama_cpp
from hasten.bench.peers.common import Environment, PeerError, Runner
from hasten.checkpoint.gguf import write_gguf
from hasten.compress import recipe, restructure
from hasten.compress.recipe import Choice
from hasten.engine import memory
from hasten.evaluate import perplexity
from hasten.evaluate import text as reading
from hasten.search import texts

WINDOW = 512


@dataclass(frozen=True)
class Row:
    name: str
    bits: float
    perplexity: float
    growth: float
    divergence: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--own", default="int4-g32:nearest,int4-g32:clip,int4-g32:gptq,codebook4-g32:gptq")
    parser.add_argument("--types", default="Q4_0:pure,Q4_0,Q4_K+imatrix:pure,Q4_K+imatrix")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--eval", type=Path)
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--output", type=Path, default=Path("build/quality"))
    options = parser.parse_args()
    model = checkpoint.open(options.model)
    model = model.at_context(min(WINDOW, model.graph.context))
    calibration = reading.read(options.calibration) if options.calibration else checkpoint.demo_text("calibration")
    held_out = reading.read(options.eval) if options.eval else checkpoint.demo_text("search")
    known, new = (
        np.asarray(model.tokenizer.encode(t, special=False), np.int32)[:n]
        for t, n in ((calibration, options.calibration_tokens), (held_out, options.eval_tokens))
    )
    if (shared := texts.overlap(known, new)) > texts.NEGLIGIBLE:
        print(f"note: {shared:.1%} of the evaluation text also stands in the calibration text", file=sys.stderr)
    windows = texts.split(new, WINDOW)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = list(own(model, options.own.split(","), texts.split(known, WINDOW), windows))
    if options.types:
        rows += theirs(model, options.types.split(","), calibration, windows)
    table = markdown(rows)
    print(table)
    (options.output / "quality.md").write_text(table + "\n")
    (options.output / "quality.json").write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
    (options.output / "quality.svg").write_text(plot(rows))
    return 0


def own(model, specs, calibration, windows):
    """`specs`: FORMAT:METHOD for all matrices, or the path of a recipe."""
    original = model.weights()
    parameters = sum(int(np.prod(s.shape)) for s in model.graph.matrices())
    kv_format = memory.kv_format(model.formats.values())
    for spec in specs:
        print(f"hasten {spec}", file=sys.stderr, flush=True)
        given = recipe.read(Path(spec)) if spec.endswith(".yaml") else None
        name, _, method = spec.partition(":")
        plan = given.structure.plan(model.graph, model.structure) if given and given.structure else None
        names = plan.names if plan else [m.name for m in model.graph.matrices()]
        choices = given.assign(names) if given else dict.fromkeys(names, Choice(name, method))
        how = restructure.Run(calibration, kv_format, folds=given.folds if given else ())
        with tempfile.TemporaryDirectory() as folder:
            made, weights = restructure.compress(model, plan, choices, how, Path(folder) / "work")
            found = perplexity.measure(made.graph, weights, windows, reference=(model.graph, original))
            size = sum(weights[m.name].nbytes for m in made.graph.matrices())
        before = float(np.exp(-np.concatenate(found.reference_logprobs).mean()))
        growth = found.perplexity / before - 1
        label = f"hasten {Path(spec).stem if given else spec.replace(':', ' ')}"
        yield Row(label, size * 8 / parameters, found.perplexity, growth, found.kl_divergence)


def theirs(model, types, calibration, windows):
    home = Environment(contenders.cache_directory() / "peers" / "llama_cpp")
    tools = home.path / "build" / "bin"
    if not (tools / "llama-quantize").exists():
        raise SystemExit(f"llama.cpp's tools are not in {tools}: hasten bench demo --against llama.cpp builds them")
    parameters = sum(int(np.prod(s.shape)) for s in model.graph.matrices())
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        half, matrix = at / "f16.gguf", at / "imatrix.gguf"
        write_gguf(model, half, "f16")
        if any("+imatrix" in t for t in types):
            (at / "calibration.txt").write_text(calibration)
            run(
                tools / "llama-imatrix", "-m", half, "-f", at / "calibration.txt", "-o", matrix, "-c", WINDOW, "-ngl", 0
            )
        runner = Runner(home.python, "run_llama_cpp.py", at / "log", llama_cpp.environment(home), quiet, "llama.cpp")
        try:
            first = list(scores(runner, half, windows, at))
            for kind in types:
                print(f"llama.cpp {kind}", file=sys.stderr, flush=True)
                name, pure, imatrix = (
                    kind.removesuffix(":pure").removesuffix("+imatrix"),
                    ":pure" in kind,
                    "+imatrix" in kind,
                )
                made = at / "made.gguf"
                flags = [*(["--imatrix", matrix] if imatrix else []), *(["--pure"] if pure else [])]
                try:
                    run(tools / "llama-quantize", *flags, half, made, name)
                except PeerError as error:
                    print(f"llama.cpp {kind}: {error}", file=sys.stderr)
                    continue
                yield row(kind, made, first, scores(runner, made, windows, at), parameters)
        finally:
            runner.close()


def row(kind, file, first, found, parameters):
    before = after = divergence = tokens = 0.0
    for (target, reference), (_, logits) in zip(first, found, strict=True):
        at = np.arange(len(target))
        before -= float(reference[at, target].sum(dtype=np.float64))
        after -= float(logits[at, target].sum(dtype=np.float64))
        divergence += float((np.exp(reference) * (reference - logits)).sum(dtype=np.float64))
        tokens += len(target)
    label = "llama.cpp " + kind.replace("+", " ").replace(":", " ")
    bits = matrices(file) * 8 / parameters
    return Row(label, bits, np.exp(after / tokens), np.exp((after - before) / tokens) - 1, divergence / tokens)


def scores(runner, file, windows, folder):
    """(targets, log-probabilities [tokens, vocabulary]) of each window."""
    for window in windows:
        out = folder / "logits.npy"
        runner.call("logits", path=str(file), out=str(out), tokens=window.tolist(), threads=2)
        logits = np.load(out)[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        yield window[1:], logits.astype(np.float32)


def matrices(file: Path) -> int:
    """Bytes of a GGUF's tensors of two dimensions."""
    from gguf import GGUFReader

    return sum(int(t.n_bytes) for t in GGUFReader(str(file)).tensors if len(t.shape) == 2 and min(t.shape) > 1)


def run(*command) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
        raise PeerError(next((line for line in reversed(lines) if line.strip()), f"exit status {done.returncode}"))


def quiet(stage: str, done: int, total: int) -> None:
    pass


def markdown(rows) -> str:
    lines = ["| | bits a weight | perplexity | growth | KL, nats a token |", "|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: (round(r.bits, 2), r.divergence)):
        lines.append(f"| {r.name} | {r.bits:.2f} | {r.perplexity:.3f} | {r.growth:+.2%} | {r.divergence:.5f} |")
    return "\n".join(lines)


def plot(rows) -> str:
    """KL against bits, both logarithmic; names at the points."""
    from html import escape

    width, height, margin = 900, 560, 70
    xs, ys = np.log([r.bits for r in rows]), np.log([max(r.divergence, 1e-6) for r in rows])

    def place(values, low, high):
        span = max(values.max() - values.min(), 1e-9)
        return low + (values - values.min()) / span * (high - low)

    px, py = place(xs, margin, width - 3 * margin), place(-ys, margin / 2, height - margin)
    points = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{"#2563eb" if r.name.startswith("hasten") else "#dc2626"}"/>'
        f'<text x="{x + 7:.1f}" y="{y + 4:.1f}" font-size="11">{escape(r.name)}</text>'
        for r, x, y in zip(rows, px, py, strict=True)
    )
    ticks = "".join(
        f'<text x="{x:.1f}" y="{height - 30}" font-size="11" text-anchor="middle">{r.bits:.2f}</text>'
        for r, x in {round(r.bits, 1): (r, x) for r, x in zip(rows, px, strict=True)}.values()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{points}{ticks}'
        f'<text x="{width / 2}" y="{height - 8}" font-size="12" text-anchor="middle">bits a weight (logarithmic)</text>'
        f'<text x="16" y="20" font-size="12">KL divergence, lower is better (logarithmic)</text></svg>\n'
    )


if __name__ == "__main__":
    sys.exit(main())
