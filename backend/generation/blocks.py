"""BlockPool: who holds which block of the KV cache, and which blocks hold a prefix that others may reuse.

It does not know where a block's keys and values lie: those tensors belong to the ranks.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from secrets import token_bytes

from backend.generation.sequence import Sequence

_KEY_BYTES = 16


class BlockPool:
    """Reference-counted blocks of `block_size` tokens.

    A full block that has been computed is published under its content's key: a keyed hash chained over the sequence's
    salt, all tokens before the block, and its own. A published block keeps its key when nobody holds it any more, until
    it is reused; the least recently released one is reused first, but after those without a key.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_queries = 0
        """Tokens of the sequences admitted so far, readmissions counted again."""
        self.prefix_hits = 0
        """Tokens of those that were found in the cache."""
        self._holders = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # in the order in which they will be reused
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._coming: dict[bytes, Sequence] = {}  # keys that a running sequence will publish soon
        self._secret = token_bytes(blake2b.MAX_KEY_SIZE)  # nobody outside can make two prompts collide

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    def blocks_for(self, length: int) -> int:
        """How many blocks `length` tokens take."""
        return -(-length // self.block_size)

    def awaits(self, seq: Sequence) -> bool:
        """Whether a running sequence is about to publish the next block that waiting `seq` could reuse."""
        last = self._shareable(seq)
        found = len(self._cached(seq))
        return found < last and seq.keys[found] in self._coming

    def admit(self, seq: Sequence, spare: int = 0) -> bool:
        """Give a blockless sequence its cached prefix, and blocks for the rest of its tokens.

        At least its last token is left to be computed. False, and no change, if fewer than `spare` blocks stayed free.
        """
        cached = self._cached(seq)
        idle = sum(not self._holders[block] for block in cached)
        if self.blocks_for(len(seq.tokens)) - len(cached) + idle + spare > self.num_free:
            return False
        for block in cached:
            self._hold(block)
        seq.blocks.extend(cached)
        seq.computed = len(cached) * self.block_size
        self.prefix_queries += len(seq.tokens)
        self.prefix_hits += seq.computed
        for key in seq.keys[len(cached) :]:
            self._coming.setdefault(key, seq)
        return self.grow(seq, len(seq.tokens))

    def grow(self, seq: Sequence, length: int) -> bool:
        """Give `seq` blocks for its first `length` tokens; False, and no change, if too few are free."""
        missing = self.blocks_for(length) - len(seq.blocks)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        seq.blocks.extend([self._take() for _ in range(missing)])
        return True

    def publish(self, seq: Sequence, start: int, end: int) -> None:
        """Let others find the blocks that computing tokens `start` to `end` has filled.

        `seq` must hold them, and a finished step must have computed all its tokens up to `end`.
        """
        first, last = start // self.block_size, end // self.block_size
        if first == last:
            return
        self._extend_keys(seq, last)
        for index in range(first, last):
            key, block = seq.keys[index], seq.blocks[index]
            self._coming.pop(key, None)
            if key not in self._block_of:
                self._block_of[key], self._key_of[block] = block, key

    def release(self, seq: Sequence) -> None:
        """Take all blocks from `seq`, its prefix last: that is most worth keeping."""
        for block in reversed(seq.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)
        for key in seq.keys:
            if self._coming.get(key) is seq:
                del self._coming[key]
        seq.blocks = array("i")  # a new array: who keeps the old one can tell that it was released
        seq.computed = 0

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Recompute the books from `sequences`, all that may hold blocks; RuntimeError unless they balance."""
        held = Counter(block for seq in sequences for block in seq.blocks)
        _expect(self._holders == [held[block] for block in range(self.num_blocks)], "holders")
        _expect(set(self._free) == set(range(self.num_blocks)) - held.keys(), "free list")
        _expect({block: key for key, block in self._block_of.items()} == self._key_of, "keys")
        _expect(all(seq.blocks for seq in self._coming.values()), "keys to come")

    def _shareable(self, seq: Sequence) -> int:
        """Make the keys of the leading blocks that `seq` may take from others; return how many."""
        count = (len(seq.tokens) - 1) // self.block_size
        self._extend_keys(seq, count)
        return count

    def _cached(self, seq: Sequence) -> list[int]:
        """Find the blocks of the longest cached prefix of `seq`."""
        blocks: list[int] = []
        for key in seq.keys[: self._shareable(seq)]:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def _extend_keys(self, seq: Sequence, count: int) -> None:
        """Make the keys of the first `count` blocks, whose tokens are all known."""
        size = self.block_size
        for index in range(len(seq.keys), count):
            parent = seq.keys[-1] if index else self._digest(seq.salt)
            seq.keys.append(self._digest(parent + seq.tokens[index * size : (index + 1) * size].tobytes()))

    def _digest(self, content: bytes) -> bytes:
        return blake2b(content, digest_size=_KEY_BYTES, key=self._secret).digest()

    def _take(self) -> int:
        """Take the free block least worth keeping, and forget what it held."""
        block, _ = self._free.popitem(last=False)
        if (key := self._key_of.pop(block, None)) is not None:
            del self._block_of[key]
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._holders[block] += 1


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"the books of the block pool do not balance: {what}")
