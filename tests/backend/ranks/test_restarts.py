"""How often and how fast a failed model is loaded again, with a clock and pauses of the test's own."""

import pytest

from backend.config import EngineConfig
from backend.ranks import restarts
from backend.ranks.restarts import Restarts


class Closing:
    """An Event that notes how long was waited for it."""

    def __init__(self, after=None):
        self.pauses, self._after = [], after

    def wait(self, seconds):
        self.pauses.append(seconds)
        return len(self.pauses) == self._after


@pytest.fixture
def now(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(restarts.time, "monotonic", lambda: clock[0])
    return clock


def failing(times):
    left = [times]

    def load():
        left[0] -= 1
        if left[0] >= 0:
            raise ValueError("no\nluck")

    return load


def made(closing, said=None, **config):
    return Restarts(EngineConfig(model="-", **config), closing, (said if said is not None else []).append)


def test_pauses_double_until_it_loads(now):
    closing, said = Closing(), []
    assert made(closing, said, restart_backoff=0.5).again(failing(3))
    assert closing.pauses == [0.5, 1.0, 2.0, 4.0]
    assert said == [f"restart {at} failed: ValueError: no luck" for at in (1, 2, 3)]


def test_it_gives_up_after_max_restarts(now):
    closing = Closing()
    assert not made(closing, max_restarts=2).again(failing(9))
    assert len(closing.pauses) == 2


def test_what_loads_and_fails_again_soon_is_given_up_too(now):
    closing = Closing()
    found = made(closing, max_restarts=2)
    for _ in range(2):
        assert found.again(failing(0))
        found.served()
        now[0] += restarts.SETTLED - 1
    assert not found.again(failing(0)) and len(closing.pauses) == 2
    now[0] += 2
    assert found.again(failing(0))  # a minute of service since: it is the first failure again


def test_closing_ends_a_pause(now):
    closing = Closing(after=2)
    assert not made(closing).again(failing(9))
    assert len(closing.pauses) == 2


def test_pauses_go_on_growing_over_failures_and_are_bounded(now):
    closing = Closing()
    found = made(closing, restart_backoff=0.5, max_restarts=9999)
    found.failures = 5000
    assert found.again(failing(0)) and closing.pauses == [restarts.LONGEST]


@pytest.mark.parametrize(("seconds", "pause"), [(restarts.SETTLED - 1, 1.0), (restarts.SETTLED + 1, 0.5)])
def test_long_service_makes_the_next_failure_the_first(now, seconds, pause):
    closing = Closing()
    found = made(closing, restart_backoff=0.5)
    assert found.again(failing(0))
    found.served()
    now[0] += seconds
    assert found.again(failing(0)) and closing.pauses == [0.5, pause]
