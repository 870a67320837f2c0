"""A model's thread over ranks that are only noted: what its owner is told, in which order, and what callers are."""

import threading

import pytest

from backend.config import EngineConfig
from backend.errors import EngineDown, LoadError
from backend.metrics import TASK
from backend.ranks.lifecycle import Hooks, Lifecycle
from backend.tally import ENDED, FAILED, READY, STARTING, Tally


class Model:
    """Notes what happens; `load` and `serve` raise what is next in line, `serve` else waits for the end."""

    def __init__(self, load=(), serve=(), **config):
        self.noted, self.said = [], []
        self._load, self._serve = list(load), list(serve)
        self.tally = Tally(TASK)
        settings = EngineConfig(model="-", restart_backoff=0.0, **config)
        hooks = Hooks(self.load, self.serve, self.fail_begun, self.fail_all)
        self.life = Lifecycle(settings, self, self.tally, self.said.append, hooks)
        self.served, self.lost = threading.Event(), threading.Event()

    def start(self):
        self.noted.append("start")

    def close(self):
        self.noted.append("close")

    def kill(self):
        self.noted.append("kill")

    def load(self):
        if self._load and (error := self._load.pop(0)):
            raise error
        return ": well"

    def serve(self):
        if self._serve:
            raise self._serve.pop(0)
        self.served.set()
        self.life.closing.wait(20)

    def fail_begun(self, error):
        self.noted.append(f"begun: {error}")

    def fail_all(self, error):
        self.noted.append(f"all: {error}")
        self.lost.set()

    def ended(self):
        self.life.close()
        return self.noted


def test_it_loads_serves_and_ends():
    model = Model()
    assert model.life.down == "is loading" and not model.life.restarting and model.tally.state == STARTING
    with pytest.raises(EngineDown, match="the model is loading; try again later"):
        model.life.check()
    model.life.start()
    model.life.check()
    assert model.served.wait(20) and model.life.down == "" and model.tally.ranks_up == 1
    assert model.tally.state == READY
    assert model.ended() == ["start", "all: the model is being unloaded", "close", "kill"]
    assert model.life.down == "is being unloaded" and model.tally.ranks_up == model.tally.restarts == 0
    assert model.tally.state == ENDED
    assert [line.endswith(" s: well") for line in model.said] == [True]


def test_a_failure_ends_what_had_begun_and_loads_again():
    model = Model(load=[None, ValueError("busy")], serve=[EngineDown("rank 0 ended")])
    model.life.start()
    assert model.served.wait(20) and model.life.down == "" and model.tally.restarts == 2
    begun = "begun: rank 0 ended; the model is restarting, try again later"
    assert model.noted == ["start", "close", begun, "start", "close", "start"]
    assert model.said[1:3] == ["down: rank 0 ended", "restart 1 failed: ValueError: busy"]
    model.ended()


def test_after_max_restarts_all_that_comes_is_told_why():
    model = Model(load=[None, ValueError("no"), ValueError("no")], serve=[EngineDown("x")], max_restarts=2)
    model.life.start()
    assert model.lost.wait(20) and model.life.down == "has failed for good (x)" and model.life.restarting
    assert model.said[-1] == "has failed for good (x)" and model.noted[-1] == "all: the model has failed for good (x)"
    assert model.ended()[-3:] == ["all: the model is being unloaded", "close", "kill"]


def test_ranks_that_load_and_fail_at_once_are_given_up():
    model = Model(serve=[EngineDown("x") for _ in range(9)], max_restarts=3)
    model.life.start()
    assert model.lost.wait(20) and model.life.down == "has failed for good (x)"
    assert model.noted.count("start") == 4 and model.tally.state == FAILED
    model.ended()


@pytest.mark.parametrize("hook", ["fail_begun", "fail_all"])
def test_a_hook_that_fails_leaves_no_model_that_neither_serves_nor_says_so(hook):
    model = Model(load=[None, ValueError("no")], serve=[EngineDown("x")], max_restarts=1)
    asked = threading.Event()

    def broken(error):
        asked.set()
        raise ValueError("a hook's own fault")

    hooks = {"load": model.load, "serve": model.serve, "fail_begun": model.fail_begun, "fail_all": model.fail_all}
    model.life._hooks = Hooks(**hooks | {hook: broken})
    model.life.start()
    assert asked.wait(20)
    eventually(lambda: model.said[-1] == "has failed for good (x)")
    assert model.life.down == "has failed for good (x)" and model.tally.state == FAILED
    model.life._hooks = Hooks(**hooks)
    assert model.lost.wait(20)
    model.ended()


def eventually(holds):
    for _ in range(2000):
        if holds():
            return
        threading.Event().wait(0.01)
    assert holds()


def test_what_cannot_be_loaded_says_so_and_leaves_no_ranks():
    model = Model(load=[LoadError("no weights")])
    with pytest.raises(LoadError, match="no weights"):
        model.life.start()
    assert model.noted == ["start", "close"] and model.said == []


def test_a_failure_while_it_ends_is_no_failure():
    model = Model()

    def serve():
        model.served.set()
        model.life.closing.wait(20)
        raise EngineDown("the ranks were killed")

    model.life._hooks = Hooks(model.load, serve, model.fail_begun, model.fail_all)
    model.life.start()
    assert model.served.wait(20)
    assert model.ended()[1:3] == ["all: the model is being unloaded", "close"] and len(model.said) == 1
