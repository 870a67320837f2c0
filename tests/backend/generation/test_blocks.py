from __future__ import annotations

from array import array

import pytest

from backend.generation.blocks import BlockPool
from backend.generation.sequence import Sequence


def sequence(length: int, first: int = 0, salt: bytes = b"") -> Sequence:
    return Sequence(array("i", range(first, first + length)), salt=salt)


def computed(pool: BlockPool, length: int, first: int = 0, salt: bytes = b"") -> Sequence:
    """A sequence whose tokens have all been computed in one step."""
    seq = sequence(length, first, salt)
    assert pool.admit(seq)
    pool.publish(seq, seq.computed, length)
    return seq


def found(pool: BlockPool, seq: Sequence) -> int:
    """Tokens of `seq` that the pool has cached; leaves the pool as it was."""
    assert pool.admit(seq)
    cached = seq.computed
    pool.release(seq)
    return cached


def test_a_prefix_is_shared_but_for_the_last_token() -> None:
    pool = BlockPool(20, 4)
    holder = computed(pool, 12)
    twin, longer, other = sequence(12), sequence(13), sequence(12, first=1)
    for seq in (twin, longer, other):
        assert pool.admit(seq)
    assert (twin.computed, longer.computed, other.computed) == (8, 12, 0)
    assert twin.blocks[:2] == holder.blocks[:2]
    assert twin.blocks[2] != holder.blocks[2]
    assert longer.blocks[:3] == holder.blocks
    assert (pool.prefix_queries, pool.prefix_hits) == (12 + 12 + 13 + 12, 20)
    pool.check([holder, twin, longer, other])


def test_blocks_not_computed_are_not_found() -> None:
    pool = BlockPool(20, 4)
    seq = sequence(12)
    assert pool.admit(seq)
    pool.publish(seq, 0, 7)
    assert found(pool, sequence(12)) == 4
    pool.publish(seq, 7, 8)
    assert found(pool, sequence(12)) == 8


def test_a_prefix_is_found_after_its_release() -> None:
    pool = BlockPool(20, 4)
    pool.release(computed(pool, 12))
    assert pool.num_free == 20
    assert found(pool, sequence(12)) == 8


@pytest.mark.parametrize(("salt", "hits"), [(b"a", 8), (b"b", 0), (b"", 0)])
def test_salts_share_nothing(salt: bytes, hits: int) -> None:
    pool = BlockPool(20, 4)
    computed(pool, 12, salt=b"a")
    assert found(pool, sequence(12, salt=salt)) == hits


def test_keys_differ_between_pools_and_are_made_once() -> None:
    one, two = computed(BlockPool(20, 4), 12), computed(BlockPool(20, 4), 12)
    assert len({*one.keys, *two.keys}) == 6
    assert {len(key) for key in one.keys} == {16}
    pool = BlockPool(20, 4)
    seq = computed(pool, 12)
    keys = list(map(id, seq.keys))
    pool.release(seq)
    assert pool.admit(seq)
    assert list(map(id, seq.keys)) == keys


def test_a_block_key_depends_on_everything_before_it() -> None:
    pool = BlockPool(20, 4)
    computed(pool, 12)
    other = sequence(13)
    other.tokens[0] = 99
    assert found(pool, other) == 0
    assert found(pool, Sequence(array("i", [*range(4), 99, *range(5, 13)]))) == 4


def test_worthless_blocks_are_reused_first_then_the_longest_unused_and_prefixes_last() -> None:
    pool = BlockPool(8, 4)
    old, new = computed(pool, 9), computed(pool, 9, first=100)  # two full blocks and a rest each; two were never used
    old_blocks, new_blocks = list(old.blocks), list(new.blocks)
    pool.release(old)
    pool.release(new)
    filler = sequence(1, first=50)
    order = []
    for length in range(1, 33, 4):
        assert pool.grow(filler, length)
        order.append(filler.blocks[-1])
    assert set(order[:4]) == {6, 7, old_blocks[2], new_blocks[2]}
    assert order[4:] == [old_blocks[1], old_blocks[0], new_blocks[1], new_blocks[0]]


def test_using_a_prefix_saves_it_from_eviction() -> None:
    pool = BlockPool(4, 4)
    pool.release(computed(pool, 8))
    pool.release(computed(pool, 8, first=100))
    assert found(pool, sequence(9)) == 8
    filler = sequence(1, first=50)
    assert pool.grow(filler, 8)
    pool.release(filler)
    assert found(pool, sequence(9)) == 8
    assert found(pool, sequence(9, first=100)) == 0


def test_too_few_blocks_change_nothing() -> None:
    pool = BlockPool(4, 4)
    seq = computed(pool, 9)
    assert not pool.grow(seq, 17)
    assert len(seq.blocks) == 3
    short = sequence(13)
    assert not pool.admit(short, spare=1)
    assert (len(short.blocks), short.computed, pool.num_free, pool.prefix_queries) == (0, 0, 1, 9)
    assert not pool.admit(sequence(8, first=50))
    pool.check([seq, short])
    assert pool.admit(sequence(12), spare=0)
    assert pool.num_free == 0


def test_an_idle_cached_block_counts_as_taken() -> None:
    pool = BlockPool(3, 4)
    pool.release(computed(pool, 9))
    assert not pool.admit(sequence(9), spare=1)
    assert pool.admit(sequence(9))


def test_usage_is_the_share_that_is_held() -> None:
    pool = BlockPool(4, 4)
    assert pool.usage == 0
    seq = computed(pool, 4)
    assert (pool.usage, pool.num_free) == (0.25, 3)
    pool.release(seq)
    assert pool.usage == 0


def test_a_prefix_on_its_way_is_awaited_until_its_holder_gives_up() -> None:
    pool = BlockPool(20, 4)
    seq = sequence(12)
    assert not pool.awaits(sequence(12))
    assert pool.admit(seq)
    assert pool.awaits(sequence(12))
    assert not pool.awaits(sequence(12, first=1))
    pool.publish(seq, 0, 4)
    assert pool.awaits(sequence(12))
    assert not pool.awaits(sequence(5))
    pool.release(seq)
    assert not pool.awaits(sequence(12))


def test_a_prefix_that_was_computed_twice_is_not_awaited_for_ever() -> None:
    pool = BlockPool(8, 4)
    one, two = sequence(5), sequence(5)
    assert pool.admit(two)
    assert pool.admit(one)
    pool.publish(one, 0, 4)
    pool.publish(two, 0, 4)  # what it holds is the same, and one copy is known
    pool.release(one)
    filler = sequence(1, first=50)
    assert pool.grow(filler, 24)  # the known copy is gone
    assert not pool.awaits(sequence(5))


@pytest.mark.parametrize("harm", ["holders", "free list", "keys"])
def test_check_finds_books_that_do_not_balance(harm: str) -> None:
    pool = BlockPool(4, 4)
    seq = computed(pool, 9)
    pool.check([seq])
    if harm == "holders":
        seq.blocks.append(3)
    elif harm == "free list":
        del pool._free[3]
    else:
        pool._key_of.clear()
    with pytest.raises(RuntimeError, match=harm):
        pool.check([seq])
