"""Pool: micro-batches of all that waits, the oldest first, each piece once, and callers wait if need be."""

import random
import threading
import time

import pytest

from backend.errors import ServingError
from backend.tasks.pool import AHEAD, Pool
from backend.tasks.request import Request

SIZE = 4


class Asked:
    def __init__(self):
        self.got = []

    def answer(self, outputs):
        self.got.append(outputs)

    def fail(self, error):
        self.got.append(error)


def request(*pieces):
    made = Request(Asked())
    made.take([list(pieces)])
    return made


def by_value(pieces):
    """The largest first, SIZE together: as texts by their length."""
    order = sorted(range(len(pieces)), key=lambda at: -pieces[at])
    return [order[at : at + SIZE] for at in range(0, len(order), SIZE)]


def values(batch):
    return [waiting.piece for waiting in batch]


def test_pieces_of_several_callers_share_micro_batches():
    pool = Pool(by_value)
    assert pool.put([request(1, 9)], 0)
    assert pool.put([request(8, 2), request(7, 3)], 0)
    assert values(pool.take(0, False)) == [2, 1]
    assert values(pool.take(0, False)) == [9, 8, 7, 3]


def test_the_micro_batch_with_the_oldest_piece_goes_first():
    pool = Pool(by_value)
    pool.put([request(1)], 0)
    pool.put([request(9, 9, 9, 9, 9)], 0)
    assert values(pool.take(0, False)) == [9, 1]
    assert values(pool.take(0, False)) == [9, 9, 9, 9]


@pytest.mark.parametrize("seed", range(10))
def test_no_piece_waits_for_younger_ones_longer_than_those_before_it_take(seed):
    rng, pool, put, taken = random.Random(seed), Pool(by_value), [], []
    while len(taken) < 300:
        if rng.random() < 0.5:
            new = request(*(rng.randint(0, 9) for _ in range(rng.randint(1, 6))))
            if pool.put([new], 0):
                put += [(new, place) for place in range(len(new.pieces))]
        oldest = next((each for each in put if each not in taken), None)
        batch = [(waiting.request, waiting.place) for waiting in pool.take(0, False)]
        assert not set(batch) & set(taken)
        assert oldest is None or oldest in batch
        taken += batch
    assert set(taken) <= set(put)


def test_what_may_yet_grow_is_kept_back_from_busy_ranks():
    pool = Pool(by_value)
    pool.put([request(1, 2)], 0)
    assert pool.take(0, full=True) == []
    pool.put([request(3, 4, 5)], 0)
    assert values(pool.take(0, full=True)) == [1]  # the one with the oldest piece
    assert pool.take(0, full=True) == []
    assert values(pool.take(0, full=False)) == [5, 4, 3, 2]


def test_callers_wait_while_enough_waits():
    pool = Pool(by_value)
    assert pool.put([request(*range(SIZE * AHEAD))], 0)
    assert not pool.put([request(1)], 0.01)
    late = threading.Thread(target=pool.put, args=([request(1)], 20))
    late.start()
    pool.take(0, False)
    late.join(20)
    assert not late.is_alive()


def test_a_failed_request_leaves_no_work_behind():
    pool, bad = Pool(by_value), request(1, 2, 3, 4, 5, 6)
    pool.put([bad, good := request(0)], 0)
    pool.take(0, False)
    bad.settle(ValueError("broke"))
    rest = [*pool.take(0, False), *pool.take(0, False)]
    assert {waiting.request for waiting in rest} <= {good}


def test_pieces_that_get_lost_are_refused_and_the_others_stay():
    pool = Pool(lambda pieces: [[0]] if 13 in pieces else by_value(pieces))
    pool.put([request(1)], 0)
    with pytest.raises(ServingError, match="2 pieces were not cut"):
        pool.put([request(13)], 0)
    assert values(pool.take(0, False)) == [1]


def test_one_that_takes_waits_for_what_comes():
    pool, found = Pool(by_value), []
    taker = threading.Thread(target=lambda: found.extend(pool.take(20, False)))
    taker.start()
    time.sleep(0.05)
    pool.put([request(5)], 0)
    taker.join(20)
    assert values(found) == [5]


def test_what_is_cleared_is_gone():
    pool = Pool(by_value)
    pool.put([request(1, 2)], 0)
    assert sorted(values(pool.clear())) == [1, 2]
    assert pool.take(0, False) == []
