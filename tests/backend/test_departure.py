"""Departure: a model that Triton has forgotten leaves, and no other one does."""

import pytest

from backend import departure
from backend.departure import LOOK, PATIENCE, Departure


class Model:
    """What the server says and what is open, on a clock of its own."""

    def __init__(self, monkeypatch):
        self.now, self.serving, self.idle, self.asked, self.left = 1000.0, False, True, 0, 0
        monkeypatch.setattr(departure.time, "monotonic", lambda: self.now)
        self.departure = Departure(self._ask, lambda: self.idle, self._leave)

    def _ask(self):
        self.asked += 1
        return self.serving

    def _leave(self):
        self.left += 1

    def passes(self, seconds):
        """A look every second."""
        for _ in range(int(seconds)):
            self.now += 1
            self.departure.look()
        return self.left


@pytest.fixture
def model(monkeypatch):
    return Model(monkeypatch)


def test_what_is_loaded_or_served_stays(model):
    assert model.passes(1000) == 0  # a long load: it has never been in service
    model.serving = True
    assert model.passes(1000) == 0
    assert model.asked == pytest.approx(2000 / LOOK, abs=1)


def test_what_is_out_of_service_leaves_once(model):
    model.serving = True
    model.passes(2 * LOOK)
    model.serving = False
    assert model.passes(PATIENCE - LOOK) == 0
    assert model.passes(3 * LOOK) == 1
    assert model.passes(1000) == 1


def test_what_still_answers_stays(model):
    """And has been in service, though no look has seen that."""
    model.idle = False
    assert model.passes(1000) == 0
    model.idle = True
    assert model.passes(PATIENCE) == 0
    assert model.passes(2 * LOOK) == 1


def test_what_comes_back_meanwhile_stays(model):
    model.serving = True
    model.passes(2 * LOOK)
    model.serving = False
    model.passes(PATIENCE - LOOK)
    model.serving = True
    model.passes(LOOK)
    model.serving = False
    assert model.passes(PATIENCE - LOOK) == 0
