"""Scheduling under a long random load: priorities, salts, shared prefixes, scored prompts, clients that leave.

The cache is a table of slots that remembers who wrote what, as in test_scheduler.py, but kept from first step to last.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter

import pytest

from hasten.engine.blocks import Blocks, salted
from hasten.engine.request import PromptScores, SamplingParams, Sequence
from hasten.engine.scheduler import PATIENCE, Scheduler, Span

SIZE = 4
PARAMS = SamplingParams()
PREFIXES = [[i] * n for i, n in enumerate((0, 4, 9, 16))]


class Load:
    """A scheduler, its cache slot by slot, and what is known of each request."""

    def __init__(self, blocks: int, max_tokens: int, max_sequences: int, max_rows: int = 0) -> None:
        self.blocks = Blocks(blocks, SIZE)
        self.scheduler = Scheduler(self.blocks, max_tokens, max_sequences, max_rows)
        self.slots: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = {}
        self.added_at: dict[Sequence, int] = {}
        self.ended_at: dict[Sequence, int] = {}
        self.found: Counter[bytes] = Counter()

    def add(self, prompt: list[int], new: int, priority: int = 0, salt: str = "", scored: bool = False) -> Sequence:
        scores = PromptScores(0) if scored else None
        made = Sequence(
            array("i", prompt),
            len(prompt),
            PARAMS,
            0,
            len(prompt) + new,
            priority=priority,
            salt=salted(salt),
            scores=scores,
        )
        self.added_at[made] = self.scheduler.steps
        self.scheduler.add(made)
        return made

    def leave(self, sequence: Sequence) -> None:
        sequence.finish_reason = "abort"
        self.scheduler.finish(sequence)

    def step(self) -> list[Span]:
        scheduler = self.scheduler
        before, waiting = set(scheduler.running), list(scheduler.waiting)
        spans = scheduler.plan()
        self._check_bounds(spans)
        self._check_order(before, waiting)
        self._write(spans)
        scheduler.commit(spans)
        for span in spans:
            if span.sequence.scores:
                span.sequence.scores.logprobs += [0.0] * span.scores
            if span.draws:
                self._grow(span.sequence)
        return spans

    def _grow(self, sequence: Sequence) -> None:
        sequence.tokens.append(sum(sequence.tokens[-3:]) % 5)
        if len(sequence.tokens) >= sequence.limit:
            sequence.finish_reason = "length"
            self.ended_at[sequence] = self.scheduler.steps
            self.scheduler.finish(sequence)
            scores = sequence.scores
            assert scores is None or len(scores.logprobs) == sequence.prompt_length - 1

    def _check_bounds(self, spans: list[Span]) -> None:
        scheduler = self.scheduler
        assert bool(spans) == bool(scheduler.running or scheduler.waiting), "work is left, and nothing is done"
        assert sum(s.stop - s.start for s in spans) <= scheduler.max_tokens
        assert sum(s.rows for s in spans) <= scheduler.max_rows
        assert len(scheduler.running) <= scheduler.max_sequences
        assert len({id(s.sequence) for s in spans}) == len(spans)
        held = Counter(b for s in scheduler.running for b in s.blocks)
        assert [held[b] for b in range(self.blocks.count)] == self.blocks.references, "a block leaked"
        assert self.blocks.free == self.blocks.count - len(held)
        assert not any(s.blocks or s.computed for s in scheduler.waiting)

    def _check_order(self, before: set[Sequence], waiting: list[Sequence]) -> None:
        """Who was let in, from those that waited, stood before all of them that wait still."""
        scheduler = self.scheduler
        admitted = [s for s in waiting if s in set(scheduler.running)]
        left = [s.rank for s in waiting if s not in before and s not in admitted]
        assert all(s.rank < min(left) for s in admitted if left), "somebody was overtaken"
        for line in (scheduler.running, scheduler.waiting):
            assert [s.rank for s in line] == sorted(s.rank for s in line)

    def _write(self, spans: list[Span]) -> None:
        """Each slot remembers its salt and all tokens up to it: what a key depends on."""
        written: set[int] = set()
        for span in spans:
            s = span.sequence
            if span.start == s.cached and s.cached:
                self.found[s.salt] += 1
            mine = {s.blocks[p // SIZE] for p in range(span.start, span.stop)}
            assert all(self.blocks.references[b] == 1 for b in mine), "a shared block is written"
            assert not mine & written, "two write one block"
            written |= mine
            for p in range(span.start, span.stop):
                self.slots[s.blocks[p // SIZE], p % SIZE] = s.salt, tuple(s.tokens[: p + 1])
        for span in spans:
            s = span.sequence
            for p in range(span.stop):
                held = self.slots[s.blocks[p // SIZE], p % SIZE]
                assert held == (s.salt, tuple(s.tokens[: p + 1])), "the cache holds another's tokens"
            assert not (s.scores and span.scores and s.cached), "a prompt that is scored was read from the cache"


@pytest.mark.parametrize(("seed", "blocks"), [(1, 12), (2, 20), (3, 60)])
def test_thousands_of_requests(seed: int, blocks: int) -> None:
    dice = random.Random(seed)
    load = Load(blocks, max_tokens=16, max_sequences=6, max_rows=9)
    added: list[Sequence] = []
    left: set[Sequence] = set()
    while len(added) < 4000 or load.scheduler.running or load.scheduler.waiting:
        if len(added) < 4000 and len(load.scheduler.waiting) < 30:
            for _ in range(dice.choice((0, 0, 1, 3))):
                prompt = [*dice.choice(PREFIXES), *(dice.randrange(3) for _ in range(dice.randint(1, 9)))]
                kind = {"priority": dice.choice((0, 0, 0, -2, 1, 3)), "salt": dice.choice(("", "", "a", "b"))}
                added.append(load.add(prompt, dice.randint(1, 12), scored=dice.random() < 0.1, **kind))
        if dice.random() < 0.05:
            alive = [*load.scheduler.running, *load.scheduler.waiting]
            if alive:
                left.add(dice.choice(alive))
                load.leave(next(s for s in alive if s in left and s.finish_reason is None))
        load.step()
        assert load.scheduler.steps < 60_000, "this never ends"
    assert load.blocks.free == blocks
    assert all(len(s.tokens) == s.limit for s in added if s not in left)
    assert {s.finish_reason for s in added} == {"length", "abort"}
    assert load.scheduler.preemptions > 100 or blocks > 20, "this load was too easy"
    assert all(load.found[salted(salt)] > 5 for salt in ("", "a", "b")), "nothing was found in the cache"
    # Work before it and a bounded number of later arrivals: nobody waits longer than that.
    longest = max(load.ended_at[s] - load.added_at[s] for s in added if s in load.ended_at)
    assert longest < 1500


def test_lower_priorities_run_first_and_arrival_decides_within_one() -> None:
    load = Load(blocks=40, max_tokens=8, max_sequences=1)
    first = load.add([1], 3)
    load.step()
    late = [load.add([2], 1, priority) for priority in (1, 0, 5, 0, -1)]
    while load.scheduler.running or load.scheduler.waiting:
        load.step()
    order = sorted([first, *late], key=lambda s: load.ended_at[s])
    assert order == [first, late[4], late[1], late[3], late[0], late[2]]


def test_the_lowest_priority_makes_room_though_it_came_first() -> None:
    load = Load(blocks=6, max_tokens=20, max_sequences=3)
    low, high = load.add([1] * 8, 8, priority=1), load.add([2] * 8, 8)
    while load.scheduler.running or load.scheduler.waiting:
        load.step()
    assert (low.preemptions, high.preemptions) == (1, 0)


def test_nobody_starves_beside_an_endless_stream_of_higher_priority() -> None:
    load = Load(blocks=40, max_tokens=4, max_sequences=1)
    patient = load.add([1, 2], 2, priority=2)
    while patient.finish_reason is None:
        if len(load.scheduler.waiting) < 3:
            load.add([3], 4, priority=0)
        load.step()
        assert load.scheduler.steps < 600, "it waits for ever"
    assert load.ended_at[patient] > PATIENCE, "priority meant nothing"


def test_salts_share_nothing_and_the_same_salt_does() -> None:
    load = Load(blocks=40, max_tokens=32, max_sequences=2)
    cached = []
    for salt in ("", "a", "b", "a", ""):
        made = load.add([7] * 13, 1, salt=salt)
        load.step()
        cached.append(made.cached)
    assert cached == [0, 0, 0, 12, 12]
