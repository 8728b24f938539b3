"""Who owns which block of the KV cache. Blocks are counted by reference, shared by the hash of their whole prefix, and
kept after use until their room is needed, the longest unused first. No numerics here.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b


def chain(parent: bytes, tokens: array[int]) -> bytes:
    """The name of a full block: a hash of its tokens and of all that stand before it (128 bits: no accidents)."""
    return blake2b(parent + tokens.tobytes(), digest_size=16).digest()


def salted(salt: str) -> bytes:
    """What the names of blocks begin with under a cache salt: under another one no name is the same."""
    return (
        blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"cache_salt").digest() if salt else b""
    )


class Blocks:
    """`count` blocks of `size` tokens. A block is either free (nobody refers to it) or referred to once or more.

    Free blocks keep their contents, and are found by hash, until they are handed out again.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self.references = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict((b, None) for b in range(count))  # oldest first
        self._hashes: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that `tokens` tokens fill."""
        return -(-tokens // self.size)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix, without taking them."""
        found = []
        for name in hashes:
            block = self._by_hash.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, block: int) -> None:
        """Refer to a block that `find` gave."""
        self._free.pop(block, None)
        self.references[block] += 1

    def take(self) -> int:
        """A block to write, referred to once; what it held before is forgotten. There must be a free one."""
        block, _ = self._free.popitem(last=False)
        name = self._hashes.pop(block, None)
        if name is not None:
            del self._by_hash[name]
        self.references[block] = 1
        return block

    def name(self, block: int, hash: bytes) -> None:
        """Let a full block be found. Where another one holds the same, that one stays the known one."""
        if hash not in self._by_hash and block not in self._hashes:
            self._hashes[block] = hash
            self._by_hash[hash] = block

    def release(self, blocks: Iterable[int]) -> None:
        """Refer no more to `blocks`, given in order of position: ends are forgotten before the beginnings they need."""
        for block in reversed(list(blocks)):
            assert self.references[block] > 0, f"block {block} released twice"
            self.references[block] -= 1
            if not self.references[block]:
                self._free[block] = None
