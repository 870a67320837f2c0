"""Models that stay UNLOADING are told that nobody serves; no other one is, and none too early."""

import contextlib

from backend.departure import NOBODY
from backend.launcher.dismissal import LOOK, PATIENCE, Dismissal
from client.control import Model
from client.errors import Unavailable


class Server:
    """Its index, on a clock of its own, and the files of its models."""

    def __init__(self, folder):
        self.folder, self.states, self.time, self.error = folder, {}, 100.0, None
        self.dismissal = Dismissal(self.reach, folder, lambda: self.time)
        for name in ("a_0_0-1", "a_1_0_0-1", "ab_0_0-1", "a-b_0_0-1"):
            (folder / f"tritonspeed-17-{name}").write_text("99")
        (folder / "tmpa_0_0-1").write_text("99")

    @contextlib.contextmanager
    def reach(self):
        if self.error:
            raise self.error
        yield self

    def models(self):
        return [Model(name, "1", state, "") for name, state in self.states.items()]

    def passes(self, seconds):
        """A look every second; the files that say nobody."""
        for _ in range(int(seconds)):
            self.time += 1
            self.dismissal.look()
        return sorted(file.name for file in self.folder.iterdir() if file.read_text() == NOBODY)


def test_what_unloads_for_too_long_is_dismissed_and_nothing_else(tmp_path):
    server = Server(tmp_path)
    server.states = {"a": "READY", "ab": "UNAVAILABLE", "a-b": ""}
    assert server.passes(10 * PATIENCE) == []
    server.states["a"] = "UNLOADING"
    assert server.passes(PATIENCE) == []
    assert server.passes(2 * LOOK) == ["tritonspeed-17-a_0_0-1"]


def test_what_comes_back_has_its_time_anew(tmp_path):
    server = Server(tmp_path)
    server.states = {"a": "UNLOADING"}
    server.passes(PATIENCE - LOOK)
    server.states = {"a": "READY"}
    server.passes(LOOK + 1)
    server.states = {"a": "UNLOADING"}
    assert server.passes(PATIENCE) == []


def test_a_server_that_does_not_answer_dismisses_nobody(tmp_path):
    server = Server(tmp_path)
    server.states, server.error = {"a": "UNLOADING"}, Unavailable("no")
    assert server.passes(3 * PATIENCE) == []
    server.error = None
    assert server.passes(PATIENCE) == []
    assert server.passes(2 * LOOK) == ["tritonspeed-17-a_0_0-1"]
