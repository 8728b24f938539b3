from __future__ import annotations

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hasten.engine.blocks import Blocks, chain


def test_a_name_depends_on_all_that_stands_before() -> None:
    one, two = array("i", [1, 2]), array("i", [3, 4])
    assert chain(chain(b"", one), two) != chain(chain(b"", two), two) != chain(b"", two)
    assert chain(b"", one) == chain(b"", array("i", [1, 2]))


def test_only_an_unbroken_prefix_is_found() -> None:
    blocks = Blocks(4, 2)
    first, second = blocks.take(), blocks.take()
    blocks.name(first, b"a")
    blocks.name(second, b"c")
    assert blocks.find([b"a", b"b", b"c"]) == [first]
    assert blocks.find([b"b", b"c"]) == []
    assert blocks.find([b"a", b"c"]) == [first, second]


def test_contents_outlive_their_owner_until_room_is_needed_ends_first() -> None:
    blocks = Blocks(3, 2)
    owned = [blocks.take() for _ in range(3)]
    for block, name in zip(owned, (b"a", b"b", b"c"), strict=True):
        blocks.name(block, name)
    blocks.release(owned)
    assert blocks.find([b"a", b"b", b"c"]) == owned
    assert blocks.take() == owned[2]
    assert blocks.find([b"a", b"b", b"c"]) == owned[:2]


def test_the_longest_unused_goes_first() -> None:
    blocks = Blocks(2, 2)
    old, new = blocks.take(), blocks.take()
    blocks.name(old, b"old")
    blocks.name(new, b"new")
    blocks.release([old])
    blocks.release([new])
    blocks.share(old)  # used again: now `new` is the longest unused
    blocks.release([old])
    assert blocks.take() == new


class Ledger(RuleBasedStateMachine):
    """Blocks held against a plain ledger: a dict of owners, and a dict of what each block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(5, 2)
        self.owners: dict[int, int] = {}
        self.names: dict[int, bytes] = {}

    @precondition(lambda self: self.blocks.free)
    @rule()
    def take(self) -> None:
        block = self.blocks.take()
        assert block not in self.owners, "handed out twice"
        self.owners[block] = 1
        self.names.pop(block, None)

    @precondition(lambda self: self.owners)
    @rule(pick=st.integers(0, 99), name=st.sampled_from([b"a", b"b", b"c"]))
    def name(self, pick: int, name: bytes) -> None:
        block = sorted(self.owners)[pick % len(self.owners)]
        self.blocks.name(block, name)
        if name not in self.names.values():
            self.names.setdefault(block, name)

    @rule(name=st.sampled_from([b"a", b"b", b"c"]))
    def share(self, name: bytes) -> None:
        found = self.blocks.find([name])
        assert found == [b for b, n in self.names.items() if n == name]
        for block in found:
            self.blocks.share(block)
            self.owners[block] = self.owners.get(block, 0) + 1

    @precondition(lambda self: self.owners)
    @rule(pick=st.integers(0, 99))
    def release(self, pick: int) -> None:
        block = sorted(self.owners)[pick % len(self.owners)]
        self.blocks.release([block])
        self.owners[block] -= 1
        if not self.owners[block]:
            del self.owners[block]

    @invariant()
    def nothing_leaks(self) -> None:
        assert self.blocks.free == 5 - len(self.owners)
        assert self.blocks.references == [self.owners.get(b, 0) for b in range(5)]


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
