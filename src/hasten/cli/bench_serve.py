"""`hasten bench-serve URL`: load on any OpenAI-compatible server, and how it bears it (hasten.bench.load)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.options import argument, option
from hasten.cli.progress import Report, reporter
from hasten.errors import InputError, OutputError

if TYPE_CHECKING:
    from hasten.bench.load.arrivals import Load, Schedule
    from hasten.bench.load.client import Target
    from hasten.bench.load.prompts import Bodies
    from hasten.bench.load.run import Result
    from hasten.bench.load.traces import Arrival

HELP = "measure how a server bears load"
PROMPT, NEW = "128:512", 64


@dataclass(frozen=True)
class Options:
    url: str = argument(help="an OpenAI-compatible server: http://127.0.0.1:8000")
    trace: Path | None = option(
        None, help="lengths and, without --rate or --clients, times of a real trace: Azure's CSV or Mooncake's JSONL"
    )
    rate: float | None = option(None, help="open loop: requests a second on average, as a Poisson process")
    clients: int | None = option(None, help="closed loop: so many clients, each with one request at a time")
    prompt: str | None = option(
        None, help=f"tokens of each prompt, drawn evenly (default: {PROMPT})", metavar="MIN:MAX"
    )
    new: int | None = option(None, help=f"tokens of each answer (default: {NEW})")
    prefix: int = option(0, help="tokens that all prompts begin with, before their own")
    limit_requests: int | None = option(None, help="requests at most")
    duration: float | None = option(None, help="seconds in which requests are sent; those under way are waited for")
    time_scale: float = option(1.0, help="a trace's times, so many times as long: 0.5 is twice the load")
    length_scale: float = option(1.0, help="a trace's lengths, so many times as long")
    context: int | None = option(None, help="leave out a trace's requests that have more tokens, prompt and answer")
    seed: int = option(0, help="of arrivals, lengths and prompts")
    model: str | None = option(None, help="the model's name (default: the first that the server lists)")
    chat: bool = option(False, help="chat completions, prompts of words (default: completions, prompts of token ids)")
    text: bool = option(False, help="completions with prompts of words")
    ids: str = option("10:1000", help="draw token ids from these; all models have them", metavar="LOW:HIGH")
    tokenizer: Path | None = option(
        None, help="folder whose tokenizer's words prompts are made of, a token each (default: common English words)"
    )
    temperature: float = option(0.0, help="of sampling; 0: greedy")
    extra: str | None = option(None, help="further fields of each request, a JSON object", metavar="JSON")
    standard_fields: bool = option(
        False, help="send no ignore_eos and min_tokens, which some servers refuse: answers may end early"
    )
    no_usage: bool = option(False, help="ask for no usage, which some servers refuse: chunks are counted as tokens")
    api_key_env: str | None = option(None, help="environment variable that holds the API key", metavar="NAME")
    slo: tuple[str, ...] | None = option(
        None, help="limits of goodput: ttft=500ms,tpot=50ms,e2e=10s", metavar="NAME=TIME,..."
    )
    warmup: int = option(0, help="requests before the load, one by one, unmeasured")
    timeout: float = option(600.0, help="seconds after which an answer is given up")
    output: Path | None = option(None, help="folder for report.json, report.md, report.svg and requests.jsonl")
    json: bool = option(False, help="print one JSON document")


def run(options: Options) -> int:
    from hasten.bench.load import report, summary
    from hasten.bench.load.arrivals import Schedule, planned
    from hasten.bench.load.http import shown
    from hasten.bench.load.prompts import Bodies, Prompts, parse_extra

    limits = summary.parse_limits(options.slo or ())
    load, target, pieces = load_of(options), target_of(options), pieces_of(options)
    extra = parse_extra(options.extra) if options.extra else None
    prepare(options)
    allow_connections()
    schedule = Schedule(load)
    arrivals = planned(schedule)
    prompts = Prompts(pieces, seed=options.seed, prefix=options.prefix)

    def bodies(model: str) -> Bodies:
        return Bodies(
            prompts,
            model,
            text=options.text,
            chat=options.chat,
            standard=options.standard_fields,
            usage=not options.no_usage,
            temperature=options.temperature,
            extra=extra,
        )

    with reporter() as progress:
        result, target, model = asyncio.run(drive(options, load, arrivals, target, bodies, progress))
    found = {
        "target": {"url": target.url, "endpoint": endpoint(options), "model": shown(model)},
        "load": described(options, load, schedule),
        **summary.summarise(result, limits),
    }
    if options.output:
        report.write(found, result, options.output)
    print(json.dumps(found, indent=1) if options.json else report.table(found))
    if result.interrupted:
        return 130
    return 0 if found["requests"]["completed"] else 1


def load_of(options: Options) -> Load:
    from hasten.bench.load.arrivals import Load

    for name in ("prompt", "new"):
        if options.trace and getattr(options, name) is not None:
            raise InputError(
                f"--{name} goes without --trace, which has lengths of its own", "--length-scale scales them"
            )
    return Load(
        trace=options.trace,
        rate=options.rate,
        clients=options.clients,
        prompt=pair(options.prompt or PROMPT, "--prompt"),
        new=NEW if options.new is None else options.new,
        prefix=options.prefix,
        limit=options.limit_requests,
        duration=options.duration,
        time_scale=options.time_scale,
        length_scale=options.length_scale,
        context=options.context,
        seed=options.seed,
    )


def target_of(options: Options) -> Target:
    from hasten.bench.load.client import parse_url

    key = None
    if options.api_key_env is not None:
        key = os.environ.get(options.api_key_env)
        if key is None:
            raise InputError(f"there is no environment variable {options.api_key_env}", "--api-key-env names it")
    return parse_url(options.url, key)


def pieces_of(options: Options) -> list[str]:
    """What prompts are made of."""
    from hasten.bench.load import prompts

    if options.chat and options.text:
        raise InputError("--chat and --text are two endpoints", "chat completions, or completions with text")
    if options.tokenizer and not (options.chat or options.text):
        raise InputError("--tokenizer goes with --chat or --text: token ids need none")
    if not (options.chat or options.text):
        return prompts.id_pieces(*pair(options.ids, "--ids"))
    if options.tokenizer is None:
        return list(prompts.COMMON)
    from hasten.checkpoint.tokenizer import Tokenizer

    tokenizer = Tokenizer(options.tokenizer)
    return prompts.word_pieces([tokenizer.token(i) for i in range(tokenizer.vocabulary_size)])


def prepare(options: Options) -> None:
    """What can be said before anything is sent."""
    if not 0.01 <= options.timeout <= 1e6:
        raise InputError(f"--timeout is {options.timeout}, must be from 0.01 to 1e6 seconds")
    if not 0 <= options.warmup <= 10_000:
        raise InputError(f"--warmup is {options.warmup}, must be from 0 to 10000")
    if not 0 <= options.temperature <= 100:
        raise InputError(f"--temperature is {options.temperature}, must be from 0 to 100")
    if options.output:
        from hasten.checkpoint.files import writable

        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{options.output} cannot be made: {error.strerror}") from None
        writable(options.output / "report.json")


def allow_connections() -> None:
    """As many open sockets as this process may have: an open loop on a slow server holds thousands."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems call unlimited what they do not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def drive(
    options: Options,
    load: Load,
    arrivals: Iterable[Arrival],
    target: Target,
    bodies: Callable[[str], Bodies],
    progress: Report,
) -> tuple[Result, Target, str]:
    from dataclasses import replace

    from hasten.bench.load import client, run

    target = replace(target, address=await client.locate(target))
    model = options.model or await client.first_model(target)
    result = await run.drive(
        target,
        load,
        arrivals,
        bodies(model),
        endpoint=endpoint(options),
        timeout=options.timeout,
        warmup=options.warmup,
        report=progress,
    )
    return result, target, model


def endpoint(options: Options) -> str:
    return "/chat/completions" if options.chat else "/completions"


def described(options: Options, load: Load, schedule: Schedule) -> dict[str, Any]:
    """The load as the report names it: in words, and each number."""
    if load.trace:
        lengths = f"lengths of {load.trace.name}" + (f" x {load.length_scale:g}" if load.length_scale != 1 else "")
    else:
        shared = f"{load.prefix} shared and " if load.prefix else ""
        low, high = load.prompt
        lengths = f"prompts of {shared}{low if low == high else f'{low} to {high}'} tokens, {load.new} new"
    stretched = f", times x {load.time_scale:g}" if load.time_scale != 1 else ""
    return {
        "kind": load.kind + stretched,
        "lengths": lengths,
        "left_out": schedule.left_out,
        "trace": str(load.trace) if load.trace else None,
        "rate": load.rate,
        "clients": load.clients,
        "limit_requests": load.limit,
        "duration": load.duration,
        "time_scale": load.time_scale,
        "length_scale": load.length_scale,
        "context": load.context,
        "seed": load.seed,
        "timeout": options.timeout,
        "temperature": options.temperature,
        "standard_fields": options.standard_fields,
        "extra": options.extra,
    }


def pair(text: str, name: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII) or re.fullmatch(r"((\d{1,9}))", text, re.ASCII)
    if not found:
        raise InputError(f"{name} is {text!r}, must be LOW:HIGH, two whole numbers, or one")
    return int(found[1]), int(found[2])
