"""Scheduling without a model: what a step computes is written into a table of slots, as a cache would hold it."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.engine.blocks import Blocks
from hasten.engine.request import SamplingParams, Sequence
from hasten.engine.scheduler import MIXED_TOKENS, Scheduler, Span

SIZE = 4


def sequence(prompt: list[int], new: int) -> Sequence:
    return Sequence(array("i", prompt), len(prompt), SamplingParams(), 0, len(prompt) + new)


class World:
    """A scheduler, and the tokens that its cache holds, slot by slot."""

    def __init__(self, blocks: int, max_tokens: int, max_sequences: int) -> None:
        self.blocks = Blocks(blocks, SIZE)
        self.scheduler = Scheduler(self.blocks, max_tokens, max_sequences)
        self.arrivals = 0
        self.slots: dict[tuple[int, int], int] = {}
        self.steps = 0

    def add(self, sequence: Sequence) -> None:
        sequence.seed = self.arrivals  # tells who came first
        self.arrivals += 1
        self.scheduler.add(sequence)

    def step(self) -> list[Span]:
        spans = self.scheduler.plan()
        self.check(spans)
        for span in spans:
            for position in range(span.start, span.stop):
                slot = span.sequence.blocks[position // SIZE], position % SIZE
                self.slots[slot] = span.sequence.tokens[position]
        for span in spans:  # all that stands before is there, whoever put it there
            for position in range(span.stop):
                slot = span.sequence.blocks[position // SIZE], position % SIZE
                assert self.slots[slot] == span.sequence.tokens[position], "the cache holds another token"
        self.scheduler.commit(spans)
        for span in spans:
            if span.draws:
                span.sequence.tokens.append(sum(span.sequence.tokens) % 5)
                if len(span.sequence.tokens) >= span.sequence.limit:
                    span.sequence.finish_reason = "length"
                    self.scheduler.finish(span.sequence)
        self.steps += 1
        return spans

    def check(self, spans: list[Span]) -> None:
        scheduler = self.scheduler
        assert bool(spans) == bool(scheduler.running or scheduler.waiting), "work is left, and nothing is done"
        assert sum(s.stop - s.start for s in spans) <= scheduler.max_tokens
        assert len(scheduler.running) <= scheduler.max_sequences
        assert all(s.start == s.sequence.computed < s.stop <= len(s.sequence.tokens) for s in spans)
        assert len({id(s.sequence) for s in spans}) == len(spans)
        held = [b for s in scheduler.running for b in s.blocks]
        assert all(held.count(b) == self.blocks.references[b] for b in range(self.blocks.count))
        written = [s.sequence.blocks[p // SIZE] for s in spans for p in {s.start // SIZE * SIZE, s.stop - 1}]
        assert all(self.blocks.references[b] == 1 for b in written), "a shared block is written"
        assert not any(s.blocks or s.computed for s in scheduler.waiting)
        assert [s.seed for s in (*scheduler.running, *scheduler.waiting)] == sorted(
            s.seed for s in (*scheduler.running, *scheduler.waiting)
        ), "somebody was overtaken"

    def run(self, sequences: list[Sequence]) -> None:
        most = 50 + sum(s.limit for s in sequences) * (1 + len(sequences))
        while self.scheduler.running or self.scheduler.waiting:
            assert self.steps < most, "this never ends"
            self.step()
        assert self.blocks.free == self.blocks.count
        assert all(s.finish_reason == "length" and len(s.tokens) == s.limit for s in sequences)


requests = st.lists(
    # Few different tokens, so that prompts share prefixes.
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=14), st.integers(1, 8), st.integers(0, 6)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(requests, st.integers(6, 14), st.integers(1, 4), st.integers(0, 6))
def test_every_request_ends_and_no_block_is_lost(
    wanted: list[tuple[list[int], int, int]], blocks: int, max_sequences: int, spare: int
) -> None:
    world = World(blocks, max_sequences + spare, max_sequences)
    sequences = []
    for prompt, new, steps_before in wanted:
        for _ in range(steps_before):
            world.step()
        sequences.append(sequence(prompt, new))
        world.add(sequences[-1])
    world.run(sequences)


@settings(max_examples=100, deadline=None)
@given(requests, st.data())
def test_dropping_requests_at_any_time_loses_nothing(
    wanted: list[tuple[list[int], int, int]], data: st.DataObject
) -> None:
    world = World(6, 5, 3)
    alive = [sequence(prompt, new) for prompt, new, _ in wanted]
    for s in alive:
        world.add(s)
    while world.scheduler.running or world.scheduler.waiting:
        world.step()
        alive = [s for s in alive if s.finish_reason is None]
        if alive and data.draw(st.booleans()):
            dropped = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
            dropped.finish_reason = "abort"
            world.scheduler.finish(dropped)
    assert world.blocks.free == 6


def test_a_long_prompt_delays_no_ones_next_token() -> None:
    world = World(blocks=20, max_tokens=8, max_sequences=3)
    short, long = sequence([1], 20), sequence([2] * 40, 1)
    world.add(short)
    world.step()
    world.add(long)
    for _ in range(5):
        spans = world.step()
        assert [(s.sequence is short, s.stop - s.start) for s in spans] == [(True, 1), (False, 7)]


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    world = World(blocks=12, max_tokens=32, max_sequences=3)
    first, second = sequence([7] * 13, 2), sequence([7] * 13, 2)
    world.add(first)
    world.run([first])
    world.add(second)
    (span,) = world.step()
    assert (span.start, span.stop) == (12, 13)
    assert second.cached == 12
    world.run([second])


def test_running_ones_share_a_prefix_and_the_last_token_is_always_computed() -> None:
    world = World(blocks=12, max_tokens=32, max_sequences=3)
    first, second = sequence([7] * 8, 4), sequence([7] * 8, 4)
    world.add(first)
    world.step()
    world.add(second)
    spans = world.step()
    assert (spans[1].start, spans[1].stop) == (4, 8)  # 8 tokens are two full blocks; one must be left to compute
    assert first.blocks[0] == second.blocks[0]
    assert first.blocks[1] != second.blocks[1]
    world.run([first, second])


def test_a_prompt_sent_many_times_at_once_is_computed_once() -> None:
    world = World(blocks=64, max_tokens=8, max_sequences=4)
    prompt = list(range(4 * SIZE + 2))
    same = [sequence(prompt, 3) for _ in range(3)]
    other = sequence([9] * SIZE, 3)
    for one in (*same, other):
        world.add(one)
    spans = []
    while any(s.computed < s.prompt_length for s in (*same, other)):
        spans += [s for s in world.step() if s.start < s.sequence.prompt_length]
    computed = [sum(s.stop - s.start for s in spans if s.sequence is one) for one in (*same, other)]
    assert computed == [4 * SIZE + 2, 2, 2, SIZE]
    assert [s.cached for s in same] == [0, 4 * SIZE, 4 * SIZE]
    world.run(same)


def test_prompts_come_in_small_chunks_while_others_decode() -> None:
    world = World(blocks=512, max_tokens=512, max_sequences=4)
    first, second = sequence([1] * 9, 50), sequence([2] * 400, 2)
    world.add(first)
    world.add(second)
    assert sum(s.stop - s.start for s in world.step()) == 409, "nobody waits for a token yet"
    third = sequence([3] * 400, 2)
    world.add(third)
    taken = []
    while third.remaining > 1:
        spans = {id(s.sequence): s.stop - s.start for s in world.step()}
        assert spans[id(first)] == 1
        taken.append(spans[id(third)])
    assert taken == [MIXED_TOKENS] * 4 + [400 - 4 * MIXED_TOKENS]


def test_the_youngest_makes_room_and_comes_back() -> None:
    world = World(blocks=5, max_tokens=16, max_sequences=2)
    old, young = sequence([1] * 8, 8), sequence([2] * 8, 8)
    world.add(old)
    world.add(young)
    world.run([old, young])
    assert (old.preemptions, young.preemptions) == (0, 1)
    # Blocks that it has filled itself are no hits.
    assert (world.scheduler.prompt_tokens, world.scheduler.found_tokens) == (16, 0)
    assert young.cached == 0
