"""hasten beside other engines: the same weights, the same work, taken in turn, each round beside the machine's limits.

A round times every engine once, so ratios are of neighbours in time. What a peer can be set to is tried first, and its
fastest is what the rounds measure. What has been measured is kept after each workload: an interrupted run goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from hasten.bench import machine, servers
from hasten.bench.contenders import Contender, Field
from hasten.bench.latency import Ratio, ratio
from hasten.bench.peers.common import PeerError, Report, Workload
from hasten.bench.work import Work
from hasten.errors import OutputError

LEAST_SECONDS = 0.3  # a measurement repeats what it times until it has taken as long
LIMIT_SECONDS = 0.1  # for each of the three limits, each round
SLOW_SECONDS = 15.0  # an engine that takes longer is not asked again: that is its figure
TRIALS = 2  # of each setting, where there are several
COLD_STEPS = 8  # steps after a first token from cold, before its peak of memory is read
PARTIAL = "partial.json"
LATENCIES = (("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"))


@dataclass(frozen=True)
class Measured:
    """One engine at one workload. `seconds` has a value for each round, or one, or none where `error` says why."""

    engine: str
    seconds: list[float]
    choice: dict[str, Any]
    served: Sequence[dict[str, float]] = ()
    """Of servers, for each round: milliseconds of `LATENCIES`, and for hasten `alone`, seconds of the engine alone."""
    via: str = ""
    peak: int = 0
    error: str = ""


def run(
    field: Field, workloads: Sequence[Workload], *, rounds: int, threads: int, output: Path, key: str, report: Report
) -> list[dict[str, Any]]:
    """Every workload measured, as dictionaries ready for JSON. What `output` holds under the same `key` is kept."""
    done = _read_partial(output, key)
    try:
        for workload in workloads:
            if workload.name not in done:
                done[workload.name] = measure(field, workload, rounds, threads, report)
                _write_partial(output, key, done)
    finally:
        for contender in field.contenders:
            contender.close()
    return [done[workload.name] for workload in workloads]


def measure(field: Field, workload: Workload, rounds: int, threads: int, report: Report) -> dict[str, Any]:
    """One workload: trials where there is something to try or to warm up, then rounds of A B C, A B C."""
    found: dict[str, Measured] = {}
    for number, contender in enumerate(field.contenders):
        report(f"{workload.name}: trying {contender.name}", number, len(field.contenders))
        found[contender.name] = trial(contender, workload)
    running = [c for c in field.contenders if not _finished(found[c.name])]
    taken: dict[str, list[float]] = {c.name: [] for c in running}
    served: dict[str, list[dict[str, float]]] = {c.name: [] for c in running}
    limits = []
    for turn in range(rounds):
        limits.append(machine.limits(LIMIT_SECONDS, threads))
        for number, contender in enumerate(list(running)):
            report(f"{workload.name}: round {turn + 1} of {rounds}", number, len(running))
            one = attempt(contender, workload, found[contender.name].choice, turn + 1)
            taken[contender.name] += one.seconds
            served[contender.name] += one.served
            found[contender.name] = replace(one, seconds=taken[contender.name], served=served[contender.name])
            if _finished(one):
                running.remove(contender)
    for contender in field.contenders:
        contender.close_server()
    return summarise(field, workload, list(found.values()), limits)


def _finished(measured: Measured) -> bool:
    return bool(measured.error) or (sum(measured.seconds) > SLOW_SECONDS and not measured.served)


def trial(contender: Contender, workload: Workload) -> Measured:
    """The fastest of what the contender can be set to, each tried `TRIALS` times in turn; that warms it up, too."""
    choices = contender.choices(workload)
    if not choices:
        return Measured(contender.name, [], {}, error="not measured: compiling takes longer than it would save")
    if workload.kind in ("ttft-cold", "serve") and len(choices) == 1:
        return Measured(contender.name, [], choices[0])
    tried: list[Measured] = []
    for _ in range(TRIALS if len(choices) > 1 and workload.kind != "serve" else 1):
        tried += [attempt(contender, workload, choice) for choice in choices]
        if any(_finished(t) for t in tried):
            break
    working = [t for t in tried if not t.error]
    return min(working, key=lambda t: t.seconds[0]) if working else tried[0]


def attempt(contender: Contender, workload: Workload, choice: dict[str, Any], turn: int = 0) -> Measured:
    """One measurement; what goes wrong is in `error`. `turn`: servers get other prompts in each."""
    try:
        if workload.kind == "serve":
            return _served(contender, workload, choice, turn)
        if workload.kind == "ttft-cold":
            seconds, peak = first_token_cold(contender, workload)
            return Measured(contender.name, [seconds], choice, peak=peak)
        runner = contender.runner
        if workload.kind in ("prefill", "ttft-warm"):
            answer = runner.call("prefill", tokens=workload.tokens, least=LEAST_SECONDS, **choice)
        else:
            sizes = {"batch": workload.batch, "depth": workload.depth, "new": workload.new}
            answer = runner.call("decode", **sizes, least=LEAST_SECONDS, **choice)
        contender.warm = True
        return Measured(contender.name, [float(answer["seconds"])], choice, via=str(answer.get("via", "")))
    except PeerError as error:
        contender.close()  # what it can still do, it does in a new process
        return Measured(contender.name, [], choice, error=str(error))


def _served(contender: Contender, workload: Workload, choice: dict[str, Any], turn: int) -> Measured:
    if contender.serve is None:
        return Measured(contender.name, [], choice, error="not measured: there is no server of it at equal bytes")
    found = contender.server(workload, choice).measure(workload, turn)
    latency = {f"{name}_{point}": float(found["latency_ms"][name][point]) for name, point in LATENCIES}
    if contender.peer == "hasten":
        latency["alone"] = float(contender.runner.call("alone", workload=asdict(workload), turn=turn)["seconds"])
    return Measured(contender.name, [float(found["seconds"])], choice, [latency])


def first_token_cold(contender: Contender, workload: Workload) -> tuple[float, int]:
    """(seconds from starting a process to the first token of a prompt, its peak of memory after a few steps).

    The interpreter's and the libraries' start, loading and the prompt are in it; files are in the system's cache.
    """
    started = time.perf_counter()
    runner = contender.start()
    try:
        load = {**contender.load, "context": workload.tokens + COLD_STEPS, "tokens": 2 * workload.tokens, "batch": 1}
        runner.call("load", **load)
        runner.call("first_token", tokens=workload.tokens)
        seconds = time.perf_counter() - started
        runner.call("decode", batch=1, depth=16, new=COLD_STEPS, least=0.0, **_binding(contender))
        return seconds, int(runner.call("peak")["bytes"])
    finally:
        runner.close()


def _binding(contender: Contender) -> dict[str, Any]:
    return {"via": "binding"} if contender.peer == "llama.cpp" else {}


def summarise(
    field: Field, workload: Workload, found: Sequence[Measured], limits: Sequence[machine.Limits]
) -> dict[str, Any]:
    """Medians with spread, shares of the limit, and ratios to each hasten, pair by pair."""
    best = limits[0]
    for one in limits[1:]:
        best = best.best(one)
    engines = {m.engine: _figures(field, workload, m, best) for m in found}
    return {
        **asdict(workload),
        "limits": [asdict(one) for one in limits],
        "engines": engines,
        "ratios": {
            ours.name: ratios(ours, field.contenders, {m.engine: m.seconds for m in found})
            for ours in field.contenders
            if ours.peer == "hasten"
        },
        "itl_p99_ratios": {
            ours.name: ratios(ours, field.contenders, {m.engine: [s["itl_p99"] for s in m.served] for m in found})
            for ours in field.contenders
            if ours.peer == "hasten" and workload.kind == "serve"
        },
    }


def ratios(ours: Contender, others: Sequence[Contender], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """How much faster hasten is than each peer of its size: {"peers": {name: Ratio}, "best": the fastest peer's}."""
    mine = seconds.get(ours.name) or []
    found: dict[str, Ratio] = {}
    for other in others:
        theirs = seconds.get(other.name) or []
        if other.peer == "hasten" or other.variant.bits not in (ours.variant.bits, 16) or not mine or not theirs:
            continue
        paired = mine if len(mine) == len(theirs) else [median(mine)] * len(theirs)
        found[other.name] = ratio([b / a for a, b in zip(paired, theirs, strict=True)])
    best = min(found, key=lambda name: median(seconds[name]), default=None)
    return {"peers": {name: asdict(value) for name, value in found.items()}, "best": best}


def _figures(field: Field, workload: Workload, measured: Measured, limits: machine.Limits) -> dict[str, Any]:
    """What is shown of one engine: tokens a second, or milliseconds to a first token."""
    shown: dict[str, Any] = {k: v for k, v in asdict(measured).items() if v and k != "engine"}
    if measured.error or not measured.seconds:
        return shown
    first = workload.kind.startswith("ttft")
    count = workload.tokens if workload.kind == "prefill" else workload.batch * workload.new
    if workload.kind == "serve":
        count = servers.requests(workload) * workload.new
        shown["latency_ms"] = {n: median(s[n] for s in measured.served) for n in measured.served[0] if n != "alone"}
        if "alone" in measured.served[0]:
            alone = [s["alone"] / seconds for s, seconds in zip(measured.served, measured.seconds, strict=True)]
            shown["of_engine_alone"] = asdict(ratio(alone))
    values = [s * 1e3 if first else count / s for s in measured.seconds]
    shown |= {"unit": "ms" if first else "tokens/s", **asdict(ratio(values))}
    contender = next(c for c in field.contenders if c.name == measured.engine)
    least = least_seconds(field.works, contender, workload, limits)
    if least is not None:
        shown["share_of_limit"] = least / median(measured.seconds)
    return shown


def least_seconds(
    works: dict[int, Work], contender: Contender, workload: Workload, limits: machine.Limits
) -> float | None:
    """The least time for the contender's own bytes and products; None from cold, where loading is most of it."""
    work = works.get(contender.variant.bits) or next(iter(works.values()))
    work = replace(work, step_bytes=contender.prepared.step_bytes, kv_bytes=contender.prepared.kv_bytes)
    if contender.variant.bits == 16:
        token, row = sum(work.token_macs), sum(work.row_macs)
        work = replace(work, token_macs=(0, token), row_macs=(0, row))
    if workload.kind in ("prefill", "ttft-warm"):
        return work.prompt_seconds(workload.tokens, limits)
    if workload.kind in ("decode", "depth"):
        return work.decode_seconds(workload.depth, workload.new, workload.batch, limits)
    return None


def _read_partial(output: Path, key: str) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((output / PARTIAL).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or found.get("key") != key or not isinstance(found.get("workloads"), dict):
        return {}
    return dict(found["workloads"])


def _write_partial(output: Path, key: str, done: dict[str, dict[str, Any]]) -> None:
    path = output / PARTIAL
    try:
        staging = path.with_suffix(".part")
        staging.write_text(json.dumps({"key": key, "workloads": done}, indent=1) + "\n")
        os.replace(staging, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
