from __future__ import annotations

import threading
import time
from array import array

import pytest

from backend.config import EngineConfig
from backend.errors import Overloaded
from backend.generation.admission import Admission, Forecast, Headroom
from backend.generation.blocks import BlockPool
from backend.generation.scheduler import Scheduler
from backend.generation.sequence import SamplingParams, Sequence
from backend.metrics import GENERATE
from backend.tally import Tally


def sequence(length: int, most: int, done: int = 0, stop: int = -1) -> Sequence:
    seq = Sequence(array("i", range(length)), SamplingParams(max_tokens=most, stop_token_ids=frozenset({stop})))
    seq.tokens.extend([1] * done)
    return seq


class Clock:
    def __init__(self) -> None:
        self.time = 50.0

    def __call__(self) -> float:
        return self.time


def served(forecast: Forecast, clock: Clock, steps: int = 40, tokens: int = 100) -> None:
    """`tokens` begin every 0.1 s while others wait."""
    for step in range(steps):
        forecast.add(step, tokens)
        forecast.turn(waiting=3)
        clock.time += 0.1
        forecast.began(step, tokens)
        forecast.turn(waiting=3)


def test_need_is_what_may_come_until_lengths_are_known() -> None:
    headroom = Headroom(0.5, BlockPool(100, 4))
    seq = sequence(6, 100)
    assert headroom.need([seq]) == 27 - 2
    headroom.ended(sequence(5, 100, done=10))
    assert headroom.need([seq]) == 4 - 2
    assert headroom.need([sequence(6, 5)]) == 3 - 2
    assert headroom.need([sequence(6, 100, done=50)]) == 1  # past the mean: a block more
    assert headroom.blocks(5) == 3


def test_none_is_preempted_where_all_that_may_come_is_left_free() -> None:
    def preempted(share: float) -> int:
        scheduler = Scheduler(BlockPool(40, 4), 16, 64, share)
        for number in range(16):
            scheduler.add(seq := sequence(8, 24))
            seq.salt = bytes([number])  # no block is shared
        while not scheduler.idle:
            chunks = scheduler.schedule()
            scheduler.commit(chunks, [1] * sum(chunk.samples for chunk in chunks))
            scheduler.check()
        return scheduler.preemptions

    assert preempted(1.0) == 0
    assert preempted(0.0) > 0


def test_the_wait_is_queued_tokens_by_the_rate_they_begin_at() -> None:
    forecast = Forecast(clock := Clock())
    served(forecast, clock)
    assert forecast.seconds == 0
    forecast.add("a", 1500)
    forecast.add("b", 500)
    assert forecast.requests == 2
    assert forecast.seconds == pytest.approx(2.0, rel=0.1)
    assert str(forecast) == f"2 requests wait for their first token, one more would for about {forecast.seconds:.1f} s"
    assert [forecast.passes(limit) for limit in (0.0, 1.5, 2.5)] == [False, True, False]
    forecast.began("a", 1000)
    assert forecast.requests == 2
    forecast.began("a", 500)
    forecast.drop("a")
    forecast.drop("b")
    forecast.drop("b")
    assert (forecast.requests, forecast.seconds) == (0, 0.0)


def test_without_a_queue_that_stood_nothing_is_forecast() -> None:
    forecast = Forecast(clock := Clock())
    for step in range(100):
        forecast.add(step, 1)
        clock.time += 0.1
        forecast.began(step, 1)
        forecast.turn(waiting=0)
    forecast.add("crowd", 10**6)
    assert forecast.seconds == 0
    assert str(forecast) == "1 requests wait for their first token"
    assert not forecast.passes(0.1)


def test_a_queue_that_does_not_move_becomes_longer() -> None:
    forecast = Forecast(clock := Clock())
    served(forecast, clock)
    forecast.add("a", 1000)
    before = forecast.seconds
    clock.time += 20
    assert forecast.seconds > 2 * before


def test_a_restart_is_no_slow_queue() -> None:
    forecast = Forecast(clock := Clock())
    served(forecast, clock)
    forecast.add("a", 1000)
    clock.time += 60
    forecast.restart()
    assert (forecast.requests, forecast.seconds) == (1, 0.0)
    served(forecast, clock)
    assert forecast.seconds == pytest.approx(1.0, rel=0.1)


def test_an_old_rate_is_forgotten() -> None:
    forecast = Forecast(clock := Clock())
    served(forecast, clock)
    served(forecast, clock, steps=200, tokens=1000)
    forecast.add("a", 10000)
    assert forecast.seconds == pytest.approx(1.0, rel=0.1)


def test_as_many_sequences_are_let_in_as_may_be_here() -> None:
    tally = Tally(GENERATE)
    admission = Admission(EngineConfig(model="-", max_sequences=2, max_waiting=3), tally)
    admission.enter("a", 4, 100)
    with pytest.raises(Overloaded, match=r"^4 sequences are running or waiting, the limit is 5 \(max_sequences"):
        admission.enter("b", 2, 100)
    admission.enter("c", 1, 10)
    assert (admission.sequences, admission.forecast.requests, tally.refused) == (5, 2, 1)
    admission.leave("a", 4)
    admission.enter("b", 4, 100)
    admission.began("b", 100)
    assert (admission.sequences, admission.forecast.requests, tally.refused) == (5, 1, 1)


def test_a_queue_that_is_too_long_lets_nobody_in() -> None:
    admission = Admission(EngineConfig(model="-", max_queue_seconds=2.0), Tally(GENERATE))
    clock = Clock()
    admission.forecast = Forecast(clock)
    served(admission.forecast, clock)
    admission.enter("a", 1, 2500)
    with pytest.raises(Overloaded, match=r"longer than 2 s \(max_queue_seconds\); 1 requests wait"):
        admission.enter("b", 1, 1)
    admission.leave("a", 1)
    admission.enter("b", 1, 1)


class Slow(int):
    """A number beside which other threads run while it is added to."""

    def __add__(self, other: int) -> Slow:
        time.sleep(0.001)
        return Slow(int(self) + other)


def test_threads_that_come_and_go_are_counted() -> None:
    tally = Tally(GENERATE)
    tally.refused = Slow(0)
    admission = Admission(EngineConfig(model="-", max_sequences=1, max_waiting=0), tally)
    admission.enter("one", 1, 1)

    def come() -> None:
        for _ in range(20):
            with pytest.raises(Overloaded):
                admission.enter(object(), 1, 1)

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.refused == 80
