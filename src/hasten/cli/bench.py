"""`hasten bench`: prefill, decode and time to first token, each as a share of the machine's limit in the same run.

With `--against` the same is measured of other engines too, in turn, on the same weights (hasten.bench.against).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.cache import Cache
from hasten.cli.options import argument, group, option
from hasten.cli.progress import reporter
from hasten.errors import BackendError, InputError, OutputError

if TYPE_CHECKING:
    from hasten.bench.latency import Run

HELP = "measure how fast a model runs here"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id, hasten artifact or demo")
    prompt: int = option(512, help="tokens of each prompt")
    new: int = option(64, help="tokens each sequence decodes after its prompt")
    batch: tuple[int, ...] = option((1, 4, 8), help="how many sequences step together", metavar="N,N,...")
    rounds: int = option(3, help="measurements of each batch size at least; medians are shown")
    random_weights: bool = option(False, help="random weights: a directory with only a config.json is enough")
    format: str | None = option(
        None, help="weight format of --random-weights (default: the model's dtype); with --against one or more, N,N,..."
    )
    cache: Cache = group(Cache)
    threads: int = option(0, help="0: one a core")
    plot: Path | None = option(None, help="also draw the speeds into this SVG file", metavar="FILE.svg")
    json: bool = option(False, help="print one JSON document")
    against: tuple[str, ...] | None = option(
        None,
        help="measure peers beside it: llama.cpp, openvino, transformers; each is installed from the package index "
        "into the cache folder's hasten/peers on first use, and kept",
        metavar="PEER,...",
    )
    workloads: tuple[str, ...] | None = option(
        None,
        help="with --against: prefill-TOKENS, decode-BATCH, depth-TOKENS, ttft-warm, ttft-cold (default: all usual)",
        metavar="NAME,...",
    )
    output: Path | None = option(
        None, help="with --against: folder for report.json, a plot and Markdown; a run cut short goes on there"
    )
    fresh: bool = option(False, help="with --against: measure anew what --output already holds")
    discard: bool = option(False, help="with --against: remove the peers' copies of the weights afterwards")


def run(options: Options) -> None:
    from hasten import checkpoint
    from hasten.bench import latency, machine
    from hasten.engine import memory
    from hasten.engine.llm import DEFAULT_CONTEXT

    check(options)
    if options.against:
        return run_against(options, options.against)
    here = machine.describe()
    model = checkpoint.open(options.model, weights=not options.random_weights)
    context = max(DEFAULT_CONTEXT, options.prompt + options.new)
    model = model.at_context(min(model.graph.context, context))  # as it is served: rope may depend on it
    with reporter() as report:
        sizes = {"prompt": options.prompt, "new": options.new, "threads": options.threads}
        name = options.format or model.dtype
        stored = {s.name: name for s in model.graph.matrices()} if options.random_weights else model.formats
        kv_format = memory.kv_format(stored.values(), options.cache.kv_format, model.kv_formats)
        limits = latency.limits_for(model.graph, batch=max(options.batch), kv_format=kv_format, **sizes)
        taken = memory.weight_bytes(model.graph, stored)
        memory.require(memory.predict(model.graph, taken, limits, stored), memory.memory()[1])
        if options.random_weights:
            weights = checkpoint.random_weights(model.graph, name)
        else:
            weights = model.weights(report)
        subject = latency.load(model.graph, weights, options.batch, kv_format=kv_format, **sizes)
        subject.warm_up(max(options.batch))
        peak = machine.peak_resident()  # before the limits are measured: their buffer is not the model's
        timed = latency.time_in_turn(
            [subject], options.batch, threads=options.threads, rounds=options.rounds, progress=report
        )
    runs = [found[0] for found, _ in timed]
    formats = Counter(w.format.name for w in weights.values() if hasattr(w, "format"))
    document = {
        "machine": machine_facts(here, runs),
        "model": {
            "source": options.model,
            "random_weights": options.random_weights,
            "parameters": subject.work.parameters,
            "bits_per_weight": subject.work.bits_per_weight,
            "formats": dict(formats),
        },
        "prompt": options.prompt,
        "new": options.new,
        "kv_format": kv_format,
        "memory": {**subject.program.memory(), "peak_resident": peak},
        "runs": [asdict(r) for r in runs],
    }
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        show(document, runs)
    if options.plot:
        write_plot(options.plot, options, runs)


def check(options: Options) -> None:
    """What can be said before anything is loaded."""
    from hasten import formats

    for name in ("workloads", "output", "fresh", "discard"):
        if getattr(options, name) and not options.against:
            raise InputError(f"--{name} goes with --against", "name the peers: --against llama.cpp,openvino")
    if options.against:
        return check_against(options, options.against)
    if options.format and not options.random_weights:
        raise InputError(
            "--format goes with --random-weights: a model's own weights have their formats",
            "hasten compress and hasten accelerate change them",
        )
    if options.format:
        formats.get(options.format)
    if options.plot:
        from hasten.checkpoint.files import writable

        writable(options.plot)


def check_against(options: Options, names: tuple[str, ...]) -> None:
    from hasten.bench import contenders, workloads

    contenders.check(names, formats_of(options))
    for name in options.workloads or ():
        workloads.parse(name)
    usual = Options(options.model)
    for name in ("prompt", "new", "batch"):
        if getattr(options, name) != getattr(usual, name):
            raise InputError(
                f"--{name} goes without --against", "--workloads prefill-512,decode-4 says what is measured"
            )
    if options.plot:
        raise InputError("--plot goes without --against", "--output DIR takes the plot of a bench beside peers")
    if options.rounds < 1 or options.threads < 0:
        raise InputError("--rounds must be at least 1 and --threads at least 0")
    if options.random_weights and not options.format:
        raise InputError("--random-weights beside peers needs --format", "for example --format int4-g128")


def formats_of(options: Options) -> tuple[str, ...]:
    return tuple(name.strip() for name in options.format.split(",")) if options.format else ()


def run_against(options: Options, names: tuple[str, ...]) -> None:
    """Prepare every engine, measure all in turn, and show, write or print what was found."""
    import hasten
    from hasten import checkpoint
    from hasten.backends.host import native_build, sources
    from hasten.bench import against, against_chart, against_report, contenders, machine, workloads

    model = checkpoint.open(options.model, weights=not options.random_weights)
    chosen, left_out = workloads.choose(options.workloads or (), model.graph.context)
    here = machine.describe()
    threads = options.threads or here.cores
    cache, random = contenders.cache_directory(), options.random_weights
    with reporter() as report, tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch)
        field = contenders.gather(
            model,
            names,
            chosen,
            format_names=formats_of(options),
            kv_format=options.cache.kv_format,
            version=hasten.__version__,
            cache=cache,
            logs=output / "logs",
            report=report,
            random=random,
            threads=threads,
        )
        key = json.dumps(
            [
                contenders.folder_for(model, random, cache).name,
                options.rounds,
                threads,
                options.cache.kv_format,
                [here.cpu, here.instruction_set, native_build(), sources()],
                sorted(f"{c.name} {c.version}" for c in field.contenders),
            ]
        )
        if options.fresh:
            (output / against.PARTIAL).unlink(missing_ok=True)
        results = against.run(
            field, chosen, rounds=options.rounds, threads=threads, output=output, key=key, report=report
        )
        found = against_report.document(
            field,
            results,
            source=options.model,
            random=random,
            rounds=options.rounds,
            threads=threads,
            left_out=left_out,
        )
        if options.output:
            (output / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (output / "report.md").write_text(against_report.markdown([found]), encoding="utf-8")
            against_chart.write(found, output / "report.svg")
    if options.discard:
        contenders.discard(model, random, cache)
    else:
        print(
            f"the peers' inputs stay in {contenders.folder_for(model, random, cache)} (--discard removes them)",
            file=sys.stderr,
        )
    print(json.dumps(found, indent=1) if options.json else against_report.table(found))
    if all(c.peer == "hasten" for c in field.contenders):
        raise BackendError("no peer could be measured", "the table's last lines say why of each")


def machine_facts(here: Any, runs: list[Run]) -> dict[str, Any]:
    """The machine, with the best of the limits measured along the way."""
    best = runs[0].limits
    for run in runs:
        best = best.best(run.limits)
    return {**asdict(here), **asdict(best)}


def write_plot(path: Path, options: Options, runs: list[Run]) -> None:
    from hasten.bench.chart import Bars, bar_chart, stack

    labels = [f"batch {r.batch}" for r in runs]
    charts = [
        bar_chart(
            f"{what}, {options.model}",
            labels,
            [
                Bars("limit", [getattr(r, rate) / getattr(r, share) for r in runs]),
                Bars("measured", [getattr(r, rate) for r in runs]),
            ],
            unit="tokens/s",
        )
        for what, rate, share in (
            (f"Prefill of {options.prompt}", "prefill_tokens_per_second", "prefill_share_of_limit"),
            (f"Decode at depth {options.prompt}", "decode_tokens_per_second", "decode_share_of_limit"),
        )
    ]
    try:
        path.write_text(stack(charts), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def show(document: dict[str, Any], runs: list[Run]) -> None:
    machine, model, memory = document["machine"], document["model"], document["memory"]
    formats = ", ".join(f"{count} {name}" for name, count in model["formats"].items())
    print(
        f"{model['source']}: {model['parameters'] / 1e6:,.1f}M parameters, "
        f"{model['bits_per_weight']:.2f} bits a weight ({formats})"
    )
    print(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}: "
        f"reads {machine['memory_read_gbs']:.1f} GB/s, int8 {machine['int8_gmacs']:.0f} GMAC/s, "
        f"bf16 {machine['bf16_gmacs']:.0f} GMAC/s"
    )
    mib = {name: f"{size / 2**20:,.1f}" for name, size in memory.items()}
    print(
        f"memory: weights {mib['weights']}, KV cache {mib['kv_cache']}, buffers {mib['buffers']}, "
        f"peak of this process {mib['peak_resident']} MiB\n"
    )
    print(
        f"{'batch':>5}{'prefill tok/s':>15}{'of limit':>10}{'decode tok/s':>14}{'of limit':>10}{'first token ms':>16}"
    )
    for run in runs:
        print(
            f"{run.batch:>5}{run.prefill_tokens_per_second:>15,.1f}{run.prefill_share_of_limit:>10.0%}"
            f"{run.decode_tokens_per_second:>14,.1f}{run.decode_share_of_limit:>10.0%}{run.ttft_ms:>16,.1f}"
        )
    if any(run.fits_cache for run in runs):
        print(
            "\nA step's bytes fit the last-level cache here: memory is no limit to decode, whose share may pass 100%."
        )
