"""How fast a model is: prefill, decode and time to first token, each beside the limit measured in the same moment.

What is timed is what serving does: steps of the compiled program, prompts in chunks, one greedy token drawn a row.
A machine's speed wanders, so only times taken in turn compare: `measure_pair` runs A B A B and gives ratios of
neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from hasten.backends import native
from hasten.backends.batch import Batch, Int32, Limits, SamplingBatch
from hasten.backends.cache import KvFormat
from hasten.bench import machine
from hasten.bench.work import Work, count
from hasten.engine import memory
from hasten.engine.llm import STEP_TOKENS
from hasten.errors import ContextError, InputError
from hasten.formats import Weight
from hasten.graph.graph import Graph

Progress = Callable[[str, int, int], None]
BLOCK = 32  # tokens in a block of the KV cache
ENOUGH_SECONDS = 1.0  # go on with short measurements until they add up to this ...
MAX_ROUNDS = 25  # ... or there are this many
SHORT_SECONDS = 0.3  # of decoding, of which one measurement says little


class Subject(Protocol):
    """Something that can be timed: a model loaded in some engine, with prompts of its own of `prompt` tokens."""

    work: Work
    prompt: int
    new: int

    def prefill(self, batch: int) -> float: ...  # seconds from empty caches to `batch` first tokens
    def decode(self, batch: int) -> float: ...  # seconds for `new` steps of `batch` sequences, just prefilled
    def warm_up(self, batch: int) -> None: ...  # what must be done before times of `batch` sequences mean anything


@dataclass(frozen=True)
class Run:
    """One batch size, medians over rounds. Rates count the tokens of all sequences together."""

    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_tokens_per_second_per_parameter: float
    ttft_ms: float
    """One prompt alone, from its arrival to its first token."""
    prefill_share_of_limit: float
    """Least time for the multiply-accumulates at the measured int8 and bf16 limits, over the time taken."""
    decode_share_of_limit: float
    """Least time for reading each byte once at the measured memory limit, over the time taken."""
    ttft_share_of_limit: float
    fits_cache: bool
    """A step's bytes fit the last-level cache, so memory is no limit and decode's share may pass 1."""
    rounds: int
    limits: machine.Limits
    """Measured just before and after, the better of the two."""


@dataclass(frozen=True)
class Ratio:
    """How much faster the second is than the first: the median over rounds, and the lowest and highest round."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class PairRun:
    """Two subjects timed in turn at one batch size."""

    batch: int
    first: Run
    second: Run
    prefill: Ratio
    decode: Ratio
    ttft: Ratio


@dataclass(frozen=True)
class Times:
    """Seconds of one round."""

    prefill: float
    decode: float
    first_token: float


def limits_for(graph: Graph, prompt: int, new: int, batch: int, threads: int, kv_format: KvFormat) -> Limits:
    """Sizes that hold `batch` sequences of prompt + new tokens. Raises InputError and ContextError as Loaded does."""
    for name, value, least in (("prompt", prompt, 1), ("new", new, 1), ("batch", batch, 1), ("threads", threads, 0)):
        if value < least:
            raise InputError(f"{name} is {value}, must be at least {least}")
    if prompt + new > graph.context:
        raise ContextError(
            f"prompt {prompt} + new {new} is {prompt + new} tokens, the model's context is {graph.context}",
            "a smaller --prompt or --new",
        )
    return Limits(
        context=prompt + new,
        max_tokens=max(min(STEP_TOKENS, batch * prompt), batch),
        max_sequences=batch,
        max_rows=batch,
        block_size=BLOCK,
        kv_blocks=-(-(prompt + new) // BLOCK) * batch,
        kv_format=kv_format,
        threads=threads,
    )


class Loaded:
    """A graph compiled for the native backend, ready to be timed: a Subject."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Any],
        *,
        prompt: int = 512,
        new: int = 64,
        batch: int = 1,
        threads: int = 0,
        kv_format: KvFormat = "auto",
    ) -> None:
        """`batch` is the largest there will be. `kv_format` auto: what serving takes for these weights.

        Raises InputError where a number is not positive, ContextError where the model's context is too short,
        MemoryLimitError where cache and buffers do not fit beside the weights.
        """
        stored = {w.format.name for w in weights.values() if isinstance(w, Weight)}
        kv_format = memory.kv_format(stored, kv_format)
        limits = limits_for(graph, prompt, new, batch, threads, kv_format)
        memory.require(memory.predict(graph, 0, limits), memory.memory()[1])
        self.work = count(graph, weights, kv_format)
        self.prompt, self.new = prompt, new
        self.program = native.compile(graph, weights, limits, tune=True)
        self._tables = np.arange(limits.kv_blocks, dtype=np.int32).reshape(batch, -1)
        draw = np.random.default_rng(0)
        self._prompts = draw.integers(0, graph.vocabulary, (batch, prompt), dtype=np.int32)
        self._last = np.zeros(batch, dtype=np.int32)  # each sequence's newest token

    def prefill(self, batch: int) -> float:
        started = time.perf_counter()
        for step, rows, sequences in self._chunks(batch):
            outputs = self.program.step(step)
            if rows:
                self._last[sequences] = outputs.sample(greedy(rows)).tokens
        return time.perf_counter() - started

    def decode(self, batch: int) -> float:
        tokens = self._last[:batch].copy()
        starts, rows = np.arange(batch + 1, dtype=np.int32), np.arange(batch, dtype=np.int32)
        sampling, tables = greedy(batch), self._tables[:batch]
        started = time.perf_counter()
        for position in range(self.prompt, self.prompt + self.new):
            step = Batch(tokens, np.full(batch, position, dtype=np.int32), starts, tables, rows)
            tokens = self.program.step(step).sample(sampling).tokens
        return time.perf_counter() - started

    def warm_up(self, batch: int) -> None:
        """Touch every page that `batch` sequences need, wake the machine, find out how work is best cut."""
        self.program.settle(lambda: self.prefill(batch))
        self.program.settle(lambda: self.decode(batch))

    def _chunks(self, batch: int) -> list[tuple[Batch, int, list[int]]]:
        """The prompts of `batch` sequences one after the other, cut into steps: (step, its wanted rows, whose)."""
        flat = np.arange(batch * self.prompt, dtype=np.int32)
        steps = []
        for chunk in np.split(flat, range(STEP_TOKENS, len(flat), STEP_TOKENS)):
            sequence, position = chunk // self.prompt, chunk % self.prompt
            present, begins = np.unique(sequence, return_index=True)
            rows = np.flatnonzero(position == self.prompt - 1).astype(np.int32)
            step = Batch(
                tokens=self._prompts[sequence, position],
                positions=position,
                starts=np.append(begins, len(chunk)).astype(np.int32),
                block_tables=self._tables[present],
                rows=rows,
            )
            steps.append((step, len(rows), sequence[rows].tolist()))
        return steps


def measure(
    graph: Graph,
    weights: Mapping[str, Any],
    *,
    prompt: int = 512,
    new: int = 64,
    batch: Sequence[int] = (1,),
    threads: int = 0,
    rounds: int = 3,
    kv_format: KvFormat = "auto",
    progress: Progress | None = None,
) -> list[Run]:
    """Time one model at each batch size. Errors as `Loaded` raises them."""
    subject = load(graph, weights, batch, prompt=prompt, new=new, threads=threads, kv_format=kv_format)
    return [runs[0] for runs, _ in time_in_turn([subject], batch, threads=threads, rounds=rounds, progress=progress)]


def measure_pair(
    first: tuple[Graph, Mapping[str, Any]],
    second: tuple[Graph, Mapping[str, Any]],
    *,
    prompt: int = 512,
    new: int = 64,
    batch: Sequence[int] = (1,),
    threads: int = 0,
    rounds: int = 5,
    kv_format: KvFormat = "auto",
    progress: Progress | None = None,
) -> list[PairRun]:
    """Time two models in turn, A B A B. A ratio above 1 says that the second is faster."""
    a, b = (
        load(graph, weights, batch, prompt=prompt, new=new, threads=threads, kv_format=kv_format)
        for graph, weights in (first, second)
    )
    return compare(a, b, batch, threads=threads, rounds=rounds, progress=progress)


def compare(
    first: Subject,
    second: Subject,
    batch: Sequence[int],
    *,
    threads: int = 0,
    rounds: int = 5,
    progress: Progress | None = None,
) -> list[PairRun]:
    """`measure_pair` for anything that can be timed."""
    found = []
    for runs, times in time_in_turn([first, second], batch, threads=threads, rounds=rounds, progress=progress):
        pairs = list(zip(*times, strict=True))
        found.append(
            PairRun(
                batch=runs[0].batch,
                first=runs[0],
                second=runs[1],
                prefill=ratio([a.prefill / b.prefill for a, b in pairs]),
                decode=ratio([a.decode / b.decode for a, b in pairs]),
                ttft=ratio([a.first_token / b.first_token for a, b in pairs]),
            )
        )
    return found


def time_in_turn(
    subjects: Sequence[Subject],
    batch: Sequence[int],
    *,
    threads: int = 0,
    rounds: int = 3,
    progress: Progress | None = None,
    decodes: int = 1,
) -> list[tuple[list[Run], list[list[Times]]]]:
    """For each batch size: a Run for each subject, and each subject's rounds. Subjects take turns within a round.

    `decodes`: times that the same tokens are decoded in a round where that is short, again in turn; the median counts.
    """
    if rounds < 1:
        raise InputError(f"rounds is {rounds}, must be at least 1")
    report = progress or (lambda stage, done, total: None)
    for subject in subjects:
        for size in sorted(batch, reverse=True):
            subject.warm_up(size)
    found = []
    for size in batch:
        limits = machine.limits(threads=threads)
        times: list[list[Times]] = [[] for _ in subjects]
        started = time.perf_counter()
        done, total = 0, rounds
        while done < total:
            report(f"timing batch {size}", done, total)
            for taken, own in zip(times, one_round(subjects, size, decodes), strict=True):
                taken.append(own)
            done += 1
            if done == total < MAX_ROUNDS and time.perf_counter() - started < ENOUGH_SECONDS * len(subjects):
                total += 1
        report(f"timing batch {size}", done, total)
        limits = limits.best(machine.limits(threads=threads))
        runs = [summarise(s, size, taken, limits) for s, taken in zip(subjects, times, strict=True)]
        found.append((runs, times))
    return found


def one_round(subjects: Sequence[Subject], batch: int, decodes: int) -> list[Times]:
    """Of each in turn one prompt alone, then `batch` prompts and their decoding; then more decoding."""
    prompts, decoding = [], []
    for subject in subjects:
        alone = subject.prefill(1)
        prompts.append((alone if batch == 1 else subject.prefill(batch), alone))
        decoding.append([subject.decode(batch)])
    for _ in range(decodes - 1 if max(own[0] for own in decoding) < SHORT_SECONDS else 0):
        for subject, taken in zip(subjects, decoding, strict=True):
            taken.append(subject.decode(batch))
    return [Times(together, median(taken), alone) for (together, alone), taken in zip(prompts, decoding, strict=True)]


def summarise(subject: Subject, batch: int, times: Sequence[Times], limits: machine.Limits) -> Run:
    prefill, decode = median(t.prefill for t in times), median(t.decode for t in times)
    first_token = median(t.first_token for t in times)
    work, cache = subject.work, machine.last_level_cache()
    prompt_seconds = work.prompt_seconds(subject.prompt, limits)
    rate = batch * subject.new / decode
    return Run(
        batch=batch,
        prefill_tokens_per_second=batch * subject.prompt / prefill,
        decode_tokens_per_second=rate,
        decode_tokens_per_second_per_parameter=rate / work.parameters,
        ttft_ms=first_token * 1e3,
        prefill_share_of_limit=batch * prompt_seconds / prefill,
        decode_share_of_limit=work.decode_seconds(subject.prompt, subject.new, batch, limits) / decode,
        ttft_share_of_limit=prompt_seconds / first_token,
        fits_cache=work.decode_bytes(subject.prompt, batch) <= cache,
        rounds=len(times),
        limits=limits,
    )


def load(graph: Graph, weights: Mapping[str, Any], batch: Sequence[int], **sizes: Any) -> Loaded:
    if not batch:
        raise InputError("no batch size given")
    if min(batch) < 1:
        raise InputError(f"batch is {min(batch)}, must be at least 1")
    return Loaded(graph, weights, batch=max(batch), **sizes)


def ratio(values: Sequence[float]) -> Ratio:
    return Ratio(median(values), min(values), max(values))


def greedy(rows: int) -> SamplingBatch:
    """The most likely token of each row."""
    zeros, ones = np.zeros(rows, dtype=np.float32), np.ones(rows, dtype=np.float32)
    none: Int32 = np.zeros(0, dtype=np.int32)
    return SamplingBatch(
        temperature=zeros,
        top_k=np.zeros(rows, dtype=np.int32),
        top_p=ones,
        min_p=zeros,
        repetition=ones,
        presence=zeros,
        frequency=zeros,
        seed=np.zeros(rows, dtype=np.uint64),
        position=np.zeros(rows, dtype=np.int64),
        history=[none] * rows,
        prompt_length=np.zeros(rows, dtype=np.int32),
    )
