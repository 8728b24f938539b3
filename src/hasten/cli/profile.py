"""`hasten profile`: where a model's time goes, fused region by fused region, each beside its own limit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.cache import Cache
from hasten.cli.options import argument, group, option
from hasten.cli.progress import reporter

if TYPE_CHECKING:
    from hasten.bench.profile import Phase, Row

HELP = "where the time goes: each fused region beside its own limit"
REST = "unaccounted: Python, checks, waking threads"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id, hasten artifact or demo")
    prompt: int = option(512, help="tokens of each prompt")
    new: int = option(32, help="tokens each sequence decodes after its prompt")
    batch: int = option(1, help="how many sequences step together")
    rounds: int = option(5, help="prefills, each with its decoding; figures are means of the quicker half")
    random_weights: bool = option(False, help="random weights: a directory with only a config.json is enough")
    format: str | None = option(None, help="weight format of --random-weights (default: the model's dtype)")
    cache: Cache = group(Cache)
    threads: int = option(0, help="0: one a core")
    each: bool = option(False, help="a line for each region of each block, not one for each kind")
    trace: Path | None = option(
        None, help="also write a Chrome trace of the last round here, for ui.perfetto.dev", metavar="FILE.json"
    )
    json: bool = option(False, help="print one JSON document")


def run(options: Options) -> None:
    from hasten.bench import loading, machine
    from hasten.bench.profile import profile
    from hasten.bench.trace import chrome_trace
    from hasten.checkpoint.files import write_whole

    check(options)
    here = machine.describe()
    sizes = {name: getattr(options, name) for name in ("prompt", "new", "batch", "threads", "random_weights", "format")}
    with reporter() as report:
        kv_format = options.cache.kv_format
        subject, weights = loading.load(options.model, progress=report, kv_format=kv_format, **sizes)
        found = profile(
            subject, weights, options.batch, rounds=options.rounds, threads=options.threads, progress=report
        )
    phases = (found.prefill, found.decode)
    document = {
        "machine": {**asdict(here), **asdict(found.limits)},
        "model": {
            "source": options.model,
            "random_weights": options.random_weights,
            "parameters": subject.work.parameters,
            "bits_per_weight": subject.work.bits_per_weight,
            "formats": dict(Counter(w.format.name for w in weights.values() if hasattr(w, "format"))),
        },
        "prompt": options.prompt,
        "new": options.new,
        "batch": options.batch,
        **{phase.name: facts(phase, options.each) for phase in phases},
    }
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        show(document, phases, options)
    if options.trace:
        text = chrome_trace(found.last, found.regions, f"hasten profile {options.model}")
        write_whole(options.trace, text.encode())


def check(options: Options) -> None:
    """What can be said before anything is loaded."""
    from hasten.bench.loading import check_format
    from hasten.errors import InputError

    check_format(options.format, options.random_weights)
    if options.rounds < 1:
        raise InputError(f"rounds is {options.rounds}, must be at least 1")
    if options.trace:
        from hasten.checkpoint.files import writable

        writable(options.trace)


def facts(phase: Phase, each: bool) -> dict[str, Any]:
    """A phase for JSON; seconds, bytes and multiply-accumulates are those of one prefill or one decoding step."""
    return {name: value for name, value in asdict(phase).items() if name != "name" and (each or name != "each")}


def show(document: dict[str, Any], phases: tuple[Phase, Phase], options: Options) -> None:
    machine, model = document["machine"], document["model"]
    formats = ", ".join(f"{count} {name}" for name, count in model["formats"].items())
    print(f"{model['source']}: {model['parameters'] / 1e6:,.1f}M parameters ({formats}), batch {options.batch}")
    print(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}: "
        f"reads {machine['memory_read_gbs']:.1f} GB/s, int8 {machine['int8_gmacs']:.0f} GMAC/s, "
        f"bf16 {machine['bf16_gmacs']:.0f} GMAC/s"
    )
    titles = (f"prefill of {options.prompt} tokens", f"a step of decoding at depth {options.prompt}")
    tokens = (options.batch * options.prompt, options.batch)
    for phase, title, count in zip(phases, titles, tokens, strict=True):
        print(
            f"\n{title}: {phase.seconds * 1e3:,.3f} ms, {count / phase.seconds:,.1f} tokens/s "
            f"(mean of the quicker {phase.counted} of {phase.passes}; "
            f"median of all {phase.median_seconds * 1e3:,.3f} ms)"
        )
        table(phase, options.each)
    if sum(row.bytes for row in phases[1].rows) <= machine["last_level_cache"]:
        print("\nA step's bytes fit the last-level cache here: memory is no limit to it, and a share may pass 100%.")


def table(phase: Phase, each: bool) -> None:
    rows = [row for row in (phase.each if each else phase.rows) if row.regions or row.seconds >= 5e-7]
    words = [row.label if each else " ".join(w for w in (row.kind, row.shape, row.format) if w) for row in rows]
    width = max(len(REST), *map(len, words))
    print(
        f"{'region':<{width}}{'count':>7}{'ms':>11}{'of time':>9}{'waiting':>9}{'MB read':>10}{'M MAC':>11}"
        f"{'limit ms':>11}{'of limit':>10}  bound by"
    )
    for word, row in zip(words, rows, strict=True):
        print(line(word, row, width))
    rest, total = phase.unaccounted_seconds, phase.seconds
    print(f"{REST:<{width}}{'':>7}{rest * 1e3:>11.3f}{rest / total:>9.1%}")
    print(
        f"{'total':<{width}}{sum(row.regions for row in rows):>7}{total * 1e3:>11.3f}{1:>9.1%}{'':>9}"
        f"{sum(row.bytes for row in rows) / 1e6:>10.2f}"
        f"{sum(row.int_macs + row.float_macs for row in rows) / 1e6:>11.1f}"
        f"{phase.limit_seconds * 1e3:>11.3f}{phase.share_of_limit:>10.0%}"
    )


def line(words: str, row: Row, width: int) -> str:
    macs = row.int_macs + row.float_macs
    shown = (
        f"{words:<{width}}{row.regions or '':>7}{row.seconds * 1e3:>11.3f}{row.share_of_time:>9.1%}"
        f"{row.waiting:>9.0%}{row.bytes / 1e6:>10.2f}{macs / 1e6:>11.1f}{row.limit_seconds * 1e3:>11.3f}"
    )
    return shown + (f"{row.share_of_limit:>10.0%}  {row.bound}" if row.bound else "")
