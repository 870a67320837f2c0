"""Models that have failed for good are loaded anew, not too often, and only as long as somebody wants them."""

import contextlib
import threading

import pytest

from backend.launcher import repair
from backend.launcher.health import Health
from backend.launcher.repair import Repair, looking
from backend.launcher.states import States
from backend.launcher.tritonserver import Ports
from client.errors import InvalidInput, Unavailable

LOADED = "I1123 15:01:07.563750 27062 model_lifecycle.cc:839] \"successfully loaded 'a'\""
UNLOADED = "I1123 15:01:40.262697 27062 model_lifecycle.cc:624] \"successfully unloaded 'a' version 1\""
GIVEN_UP = "tritonspeed | a | has failed for good (rank 0 was killed)"
MINUTES = 60.0


class Server:
    """The control API of a server with the model `a`."""

    def __init__(self):
        self.states, self.asked, self.error, self.time, self.models = States(), [], None, 0.0, {"a"}
        self.said = []
        served = self.models.__contains__
        self.repair = Repair(self.states, self.reach, served, 10 * MINUTES, self.said.append, lambda: self.time)
        self.tell(LOADED)

    def tell(self, *lines):
        for line in lines:
            self.states.tell(line)

    @contextlib.contextmanager
    def reach(self):
        yield self

    def unload(self, name, timeout):
        self.asked.append("unload")

    def wait_gone(self, name, timeout):
        self.asked.append("wait")
        self.tell(UNLOADED)

    def load(self, name, timeout):
        self.asked.append("load")
        if self.error:
            raise self.error
        self.tell("tritonspeed | a | ready in 1 s", LOADED)

    def look(self, after=0.0):
        """What was asked of it this time."""
        self.time += after
        self.asked.clear()
        self.repair.look()
        return self.asked.copy()


@pytest.fixture
def server():
    return Server()


def test_what_serves_or_restarts_is_left_alone(server):
    assert server.look() == []
    server.tell("tritonspeed | a | down: rank 0 was killed")
    assert server.look() == []


def test_what_has_failed_for_good_is_loaded_anew_and_well(server):
    server.tell(GIVEN_UP)
    assert server.look() == ["unload", "wait", "load"]
    assert server.states.failed == [] and server.states.trouble("a") is None
    assert server.said == ["a | has failed for good (rank 0 was killed): loading it anew"]


def test_what_fails_again_stays_in_trouble_and_is_tried_once_in_a_while(server, monkeypatch):
    server.error = InvalidInput("'a' could not be loaded: no weights")
    server.tell(GIVEN_UP)
    server.look()
    assert server.states.loaded == [] and server.states.failed == server.states.lost == ["a"]
    assert server.states.trouble("a") == "failed for good: 'a' could not be loaded: no weights"
    monkeypatch.setattr("backend.launcher.health.ready", lambda ports: True)
    health = Health(Ports("127.0.0.1", 1, 2, 3), None, server.states)
    assert health.trouble() == "model a: failed for good: 'a' could not be loaded: no weights"
    assert server.look(9 * MINUTES) == []
    assert server.look(2 * MINUTES) == ["load"]
    server.error = None
    assert server.look(9 * MINUTES) == []
    assert server.look(2 * MINUTES) == ["load"]
    assert server.states.loaded == ["a"] and server.states.trouble("a") is None and server.states.failed == []


def test_a_model_that_fails_again_soon_waits_too(server):
    server.tell(GIVEN_UP)
    assert server.look()
    server.tell(GIVEN_UP)
    assert server.look(9 * MINUTES) == []
    assert server.states.trouble("a") == "has failed for good (rank 0 was killed)"
    assert server.look(2 * MINUTES) == ["unload", "wait", "load"]


def test_who_loads_it_himself_ends_the_trouble(server):
    server.error = Unavailable("no server")
    server.tell(GIVEN_UP)
    server.look()
    server.tell(LOADED)
    assert server.states.trouble("a") is None and server.look(60 * MINUTES) == []


def test_what_has_left_the_repository_is_not_wanted(server):
    server.error = Unavailable("no server")
    server.tell(GIVEN_UP)
    server.look()
    server.models.clear()
    assert server.look(60 * MINUTES) == []
    assert server.states.failed == [] and server.states.trouble("a") is None


def test_it_looks_as_long_as_it_should(monkeypatch):
    looked = threading.Event()
    monkeypatch.setattr(repair, "_LOOK_SECONDS", 0.01)

    class Looking:
        def look(self):
            looked.set()

    with looking(Looking().look):
        assert looked.wait(10)
        (thread,) = [each for each in threading.enumerate() if each.name == "looking"]
    thread.join(10)
    assert not thread.is_alive()
