"""`hasten generate`: continues a text, shown as it comes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.cli.cache import Room
from hasten.cli.options import argument, group, option, required
from hasten.cli.progress import reporter
from hasten.cli.sampling import Sampling

if TYPE_CHECKING:
    from hasten.engine.llm import Stream

HELP = "continue a text"


@dataclass(frozen=True)
class Options:
    model: str = argument(help="directory, hub id, hasten artifact or demo")
    prompt: str = required("-p", help="the text to continue")
    tokens: int = option(128, "-n", help="tokens to write at most")
    sampling: Sampling = group(Sampling)
    ignore_eos: bool = option(False, help="go on where the model would end")
    context: int | None = option(
        None, help="tokens that prompt and answer may have (default: the model's, at most 4096)"
    )
    cache: Room = group(Room)
    threads: int = option(0, help="0: one a core")
    json: bool = option(False, help="print one JSON document at the end instead of text as it comes")


def run(options: Options) -> None:
    from hasten import checkpoint
    from hasten.engine.llm import LLM

    model = checkpoint.open(options.model)
    params = options.sampling.params(model.generation, max_tokens=options.tokens, ignore_eos=options.ignore_eos)
    with reporter() as report:
        llm = LLM(
            model,
            context=options.context,
            max_batch=1,
            threads=options.threads,
            kv_format=options.cache.kv_format,
            memory=options.cache.budget,
            report=report,
        )
    started = time.perf_counter()
    stream = llm.stream(options.prompt, params)
    first = _write(stream, quiet=options.json)
    ended = time.perf_counter()
    result, (answer,) = stream.output, stream.output.outputs
    prompt, new = len(result.prompt_token_ids), len(answer.token_ids)
    first = ended if first is None else first
    rate = (new - 1) / (ended - first) if new > 1 and ended > first else None
    if options.json:
        document = {
            "model": options.model,
            "prompt": options.prompt,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": prompt,
            "tokens": new,
            "seed": params.seed,
            "ttft_ms": 1000 * (first - started),
            "decode_tokens_per_second": rate,
        }
        print(json.dumps(document, ensure_ascii=False, indent=1))
        return
    speed = f", then {rate:.1f} tokens/s" if rate else ""
    took = f"first after {1000 * (first - started):.0f} ms{speed}"
    print(
        f"{prompt} tokens of prompt, {new} written ({answer.finish_reason}); {took}; seed {params.seed}",
        file=sys.stderr,
    )
    if answer.finish_reason == "length" and new < options.tokens:
        print(f"the context of {prompt + new} tokens is full: {options.tokens} were asked for", file=sys.stderr)


def _write(stream: Stream, quiet: bool) -> float | None:
    """Text to stdout as it comes. Returns when the first token was there; None where no token gave text."""
    first = None
    try:
        for piece in stream:
            first = first or time.perf_counter()
            if not quiet:
                print(piece, end="", flush=True)
    finally:
        if not quiet:
            print(flush=True)  # also when interrupted: what follows begins on a line of its own
    return first
