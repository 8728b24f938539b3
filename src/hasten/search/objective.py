"""What a search makes cheap: steps of decoding or of prompts, both in a mix, or memory; and what it must reach."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hasten.bench.load import traces
from hasten.engine.llm import STEP_TOKENS
from hasten.errors import BudgetError, ContextError, InputError

NAMES = ("decode", "prefill", "throughput", "memory")
MOST_BATCH = 1024
MOST_TOKENS = 1 << 24
BATCH = 16
"""Of throughput, where none is given."""
_LENGTHS = re.compile(r"(\d{1,8}):(\d{1,8})", re.ASCII)
_TARGET = re.compile(r"(\w+)\s*=\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:tok(?:ens)?/s)", re.ASCII | re.IGNORECASE)
TARGET_HINT = "write decode=50tok/s, prefill=2000tok/s or throughput=200tok/s"


@dataclass(frozen=True)
class Phase:
    """Steps of one kind: `tokens` go through each, the head sees `rows` of them, and there are `count` of them."""

    tokens: int
    rows: int
    count: float


@dataclass(frozen=True)
class Target:
    """A speed that must be reached, tokens a second of all sequences together."""

    part: str
    rate: float

    def __str__(self) -> str:
        return f"{self.part}={self.rate:.12g}tok/s"


@dataclass(frozen=True)
class Objective:
    """`batch` sequences at a time, each a prompt of `prompt` tokens and `new` tokens written after it."""

    name: str = "decode"
    batch: int = 1
    prompt: int = 512
    new: int = 64
    target: Target | None = None
    cap: int | None = None
    """Bytes that weights, cache and buffers may take together."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What the matrices' times are composed of: a step of decoding, a step of prompts, or a whole round of both."""
        step = min(STEP_TOKENS, self.batch * self.prompt)
        prompts = Phase(step, max(1, step // self.prompt), 1.0)
        if self.name == "decode":
            return (Phase(self.batch, self.batch, 1.0),)
        if self.name == "prefill":
            return (Phase(min(STEP_TOKENS, self.prompt), 1, 1.0),)
        if self.name == "throughput":
            return (
                replace(prompts, count=self.batch * self.prompt / step),
                Phase(self.batch, self.batch, float(self.new)),
            )
        return ()

    @property
    def unit(self) -> str:
        """What the phases make up."""
        each = f"{self.batch} sequence" + "s" * (self.batch > 1)
        return {
            "decode": f"step of {each}",
            "prefill": f"step of {min(STEP_TOKENS, self.prompt)} prompt tokens",
            "throughput": f"round of {each}",
        }.get(self.name, "")

    def within(self, context: int) -> Objective:
        """With lengths that a model of `context` tokens holds."""
        prompt = max(1, min(self.prompt, context // 2 if self.prompt + self.new > context else self.prompt))
        return replace(self, prompt=prompt, new=max(1, min(self.new, context - prompt)))


def make(
    name: str | None,
    batch: int | None,
    lengths: str | None,
    trace: Path | None,
    target: str | None,
    cap: int | None,
    context: int,
    say: Callable[[str], None],
) -> Objective:
    """From what the user stated. Raises InputError, ContextError or BudgetError where it makes no sense."""
    if name is not None and name not in NAMES:
        raise InputError(f"unknown objective '{name}'", f"objectives: {', '.join(NAMES)}")
    aim = parse_target(target) if target else None
    if aim and name not in (None, aim.part):
        raise BudgetError(
            f"the target {aim} contradicts the objective {name}",
            f"leave --objective out: a target of {aim.part} has it",
        )
    name = name or (aim.part if aim else "decode")
    if batch is not None and not 1 <= batch <= MOST_BATCH:
        raise InputError(f"batch is {batch}, must be from 1 to {MOST_BATCH}")
    if lengths and trace:
        raise InputError("lengths and a trace contradict each other", "give --lengths or --trace")
    size = batch or (BATCH if name == "throughput" else 1)
    made = Objective(name, size, target=aim, cap=cap)
    if lengths:
        prompt, new = parse_lengths(lengths)
        if prompt + new > context:
            raise ContextError(
                f"prompt {prompt} + new {new} is {prompt + new} tokens, the model's context is {context}",
                "shorter --lengths",
            )
        return replace(made, prompt=prompt, new=new)
    if trace:
        prompt, new, kept, total = mean_lengths(trace, context)
        say(
            f"{trace}: {kept:,} of {total:,} requests fit the context of {context} tokens; "
            f"on average a prompt of {prompt} and {new} new tokens"
        )
        return replace(made, prompt=prompt, new=new)
    return made.within(context)


def parse_target(text: str) -> Target:
    """`decode=50tok/s` -> Target. Raises BudgetError."""
    found = _TARGET.fullmatch(text.strip())
    if not found or found[1].lower() not in ("decode", "prefill", "throughput"):
        raise BudgetError(f"cannot read the target '{text}'", TARGET_HINT)
    rate = float(found[2])
    if not 0 < rate < math.inf:
        raise BudgetError(f"the target '{text}' must be more than 0", TARGET_HINT)
    return Target(found[1].lower(), rate)


def parse_lengths(text: str) -> tuple[int, int]:
    """`512:64` -> (prompt, new). Raises InputError."""
    found = _LENGTHS.fullmatch(text.strip())
    if not found or not int(found[1]) or not int(found[2]):
        raise InputError(f"lengths is '{text}', must be tokens of the prompt and new ones, as 512:64")
    return int(found[1]), int(found[2])


def mean_lengths(trace: Path, context: int) -> tuple[int, int, int, int]:
    """(prompt, new, requests that fit `context`, all requests) of a trace, lengths on average over those that fit.

    Raises InputError as `traces.read` does, and where none fits.
    """
    prompts = news = kept = total = 0
    for arrival in traces.read(trace):
        total += 1
        if arrival.prompt + arrival.new <= context:
            prompts, news, kept = prompts + arrival.prompt, news + arrival.new, kept + 1
    if not kept:
        raise InputError(f"none of the {total:,} requests of {trace} fits the model's context of {context} tokens")
    return max(1, round(prompts / kept)), max(1, round(news / kept)), kept, total
