"""What a server's lines and metrics say of its models."""

import time
from pathlib import Path

import pytest

from backend.launcher import health
from backend.launcher.health import Health
from backend.launcher.states import States
from backend.launcher.tritonserver import Ports

LOADED = "I1123 15:01:07.563750 27062 model_lifecycle.cc:839] \"successfully loaded 'a'\""
UNLOADED = "I1123 15:01:40.262697 27062 model_lifecycle.cc:624] \"successfully unloaded 'a' version 1\""


def told(*lines):
    states = States()
    for line in lines:
        states.tell(line)
    return states


def test_a_model_that_serves_is_loaded_and_well():
    states = told("tritonspeed | a | ready in 3 s: 10 KV blocks", LOADED)
    assert states.loaded == ["a"] and states.trouble("a") is None


def test_it_is_in_trouble_from_down_to_ready():
    states = told(LOADED, "tritonspeed | a | down: rank 0 was killed")
    assert states.trouble("a") == "down: rank 0 was killed"
    states.tell("tritonspeed | a | rank 0 | loaded 50 % of the weights")
    states.tell("tritonspeed | a | restart 1 failed: no room")
    assert states.trouble("a") == "down: rank 0 was killed"
    states.tell("tritonspeed | a | has failed for good (rank 0 was killed)")
    assert states.trouble("a") == "has failed for good (rank 0 was killed)"
    states.tell("tritonspeed | a | ready in 3 s")
    assert states.trouble("a") is None


def test_unloading_ends_its_trouble():
    states = told(LOADED, "tritonspeed | a | has failed for good (x)", UNLOADED)
    assert states.loaded == [] and states.trouble("a") is None


def test_a_reload_leaves_it_loaded():
    assert told(LOADED, LOADED, UNLOADED).loaded == ["a"]
    assert told(LOADED, LOADED, UNLOADED, UNLOADED).loaded == []


@pytest.mark.parametrize(
    "line",
    [
        "successfully unloaded 'a' version 1",
        f"I am {UNLOADED}",
        "I1123 15:01:40.262697 27062 grpc_server.cc:1] \"successfully unloaded 'a' version 1\"",
        "x tritonspeed | a | down: no",
        "tritonspeed | a | rank 0 | down: no",
    ],
)
def test_what_others_say_counts_nothing(line):
    states = told(LOADED, line)
    assert states.loaded == ["a"] and states.trouble("a") is None


@pytest.mark.parametrize(("age", "trouble"), [(1, None), (60, "model a: its process gives no sign of life")])
def test_a_stub_that_pushes_nothing_is_in_trouble(monkeypatch, age, trouble):
    beat = f'tritonspeed_heartbeat_seconds{{model="a",version="1"}} {time.time() - age}\n'
    other = 'tritonspeed_heartbeat_seconds{model="unloaded",version="1"} 5\n'
    monkeypatch.setattr(health, "_read", lambda url: beat + other)
    assert Health(Ports("127.0.0.1", 1, 2, 3), Path("/none"), told(LOADED)).trouble() == trouble


def test_a_finding_holds_for_a_moment(monkeypatch):
    asked = []
    monkeypatch.setattr(health, "_read", asked.append)
    look = Health(Ports("127.0.0.1", 1, 2, 3), Path("/none"), States())
    assert [look.trouble(), look.trouble()] == ["tritonserver is not ready"] * 2
    assert len(asked) == 1
    monkeypatch.setattr(health, "KEPT", 0.0)
    look._until = 0.0
    look.trouble()
    look.trouble()
    assert len(asked) == 3
