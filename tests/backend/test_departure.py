"""Departure: a model that Triton has forgotten leaves, and no other one does."""

import os
import tempfile

import pytest

from backend import departure
from backend.departure import LOOK, NOBODY, PATIENCE, Departure, Latest


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
            assert self.departure.look() == bool(self.left)
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


# ---- which process serves a model


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_who_said_so_last_is_the_latest(folder):
    old = Latest("m_0_0-1")
    assert old
    (file,) = folder.iterdir()
    file.write_text(str(os.getppid()))  # a later process that lives
    assert not old
    old.close()
    assert file.exists()
    new = Latest("m_0_0-1")
    assert new
    new.close()
    assert not file.exists()


def test_nobody_is_the_latest_where_the_launcher_says_so(folder):
    latest = Latest("m_0_0-1")
    (file,) = folder.iterdir()
    file.write_text(NOBODY)
    assert not latest
    assert Latest("m_0_0-1")  # loaded again
    file.write_text(NOBODY)
    latest.close()
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "x", str(2**22 + 1)])
def test_a_later_one_that_has_ended_or_is_unreadable_does_not_count(folder, text):
    latest = Latest("m")
    (file,) = folder.iterdir()
    file.write_text(text)
    assert latest
    file.unlink()
    assert latest


def test_a_link_that_lies_there_is_not_followed(folder):
    target = folder / "target"
    target.write_text("kept")
    (folder / f"tritonspeed-{os.getppid()}-m").symlink_to(target)
    assert Latest("m")
    assert target.read_text() == "kept"
