"""The rank group against a worker without a model: answers, order, deaths, time limits, and that nothing is left."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from backend.config import EngineConfig
from backend.errors import EngineDown, LoadError
from backend.ranks.group import RankGroup, environment

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))
from processes import ranks  # noqa: E402


@pytest.fixture(autouse=True)
def _toy_is_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)


@pytest.fixture
def group():
    group = make(2)
    group.start()
    yield group
    group.close()


def make(world, lines=None, **parameters):
    config = EngineConfig(model=parameters.pop("model", "toy"), tensor_parallel=world, **parameters)
    return RankGroup(config, "toy_worker:Toy", (lines if lines is not None else []).append)


def look_after(group, enough=lambda: False):
    """As an owner without work does, for twenty seconds or until it is enough."""
    for _ in range(400):
        if enough():
            return
        time.sleep(0.05)
        group.check()
    raise AssertionError("nothing in twenty seconds")


def test_every_rank_answers_in_rank_order(group):
    assert group.call("add", 1, 2) == [3, 4]


def test_answers_come_in_the_order_of_the_questions(group):
    group.send("deferred", 0.2, "first")
    group.send("deferred", 0.0, "second")
    assert group.receive(5) == ["first", "first"]
    assert group.receive(5) == ["second", "second"]


def test_a_deferred_answer_does_not_hold_up_the_next_question(group):
    start = time.monotonic()
    group.send("deferred", 2.0, "slow")
    assert time.monotonic() - start < 1.5
    assert group.receive(5) == ["slow", "slow"]


def test_an_immediate_answer_does_not_overtake_a_deferred_one(group):
    group.send("deferred", 0.3, "first")
    group.send("add", 1, 2)
    group.send("deferred", 0.0, "third")
    assert [group.receive(5) for _ in range(3)] == [["first", "first"], [3, 4], ["third", "third"]]


def test_progress_is_reported_in_lines():
    lines = []
    group = make(2, lines)
    group.start()
    group.close()
    assert sorted(lines) == ["rank 0 | made", "rank 1 | made"]


def test_a_load_error_keeps_its_class_and_becomes_one_line():
    group = make(2, model="unloadable")
    with pytest.raises(LoadError, match=r"^no such thing at all$"):
        group.start()
    assert ranks() == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_fails_the_call_at_once(group, rank):
    with pytest.raises(EngineDown, match=f"rank {rank} was killed by SIGKILL"):
        group.call("die", rank)


def test_an_exit_status_is_named(group):
    with pytest.raises(EngineDown, match="rank 1 ended with exit status 3"):
        group.call("leave", 1)


def test_one_rank_that_raises_fails_the_call_though_the_others_are_busy(group):
    with pytest.raises(EngineDown, match=r"rank 1: ValueError at fakes/toy_worker\.py:\d+ fail < "):
        group.call("fail", 1, "ValueError")


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [(0.1, "rank 1 was killed by SIGKILL"), (30, r"rank 0: ValueError at fakes/toy_worker\.py")],
    ids=["soon", "no time soon"],
)
def test_a_rank_that_dies_is_the_reason_for_what_fails_on_the_other(group, seconds, reason):
    with pytest.raises(EngineDown, match=reason):
        group.call("die_later", 1, seconds)


@pytest.mark.parametrize("deferred", [False, True])
def test_an_unexpected_failure_is_told_by_class_and_place_alone(deferred, capfd):
    """Its message may quote a prompt; stderr is the server's log. docs/faults.md, 27."""
    group = make(1)  # with this test's stderr
    group.start()
    try:
        with pytest.raises(EngineDown) as raised:
            group.call("quote", "secretprompt", deferred)
    finally:
        group.close()
    said = capfd.readouterr()
    for told in (str(raised.value), said.err):
        assert re.search(r"ValueError at fakes/toy_worker\.py:\d+ answer", told)
    assert "secretprompt" not in f"{raised.value}{said.out}{said.err}"


def test_an_error_of_ours_keeps_its_message():
    group = make(1)
    group.start()
    try:
        with pytest.raises(EngineDown, match="rank 0: it broke"):
            group.call("fail", 0, "InvalidInput")
    finally:
        group.close()


def test_what_fails_at_the_start_keeps_its_message(capfd):
    """Nobody has asked for anything yet."""
    group = make(1, model="unreadable")
    with pytest.raises(EngineDown, match="rank 0: ValueError: a header too large"):
        group.start()
    group = make(1)
    group.start()
    try:
        with pytest.raises(EngineDown, match="rank 0: ValueError: no kernel image is available"):
            group.call("warm_up")
    finally:
        group.close()
    assert capfd.readouterr().err.count("Traceback") == 2


def test_a_death_while_idle_is_noticed(group):
    group.check()
    victim = psutil.Process(ranks()[1])
    victim.kill()
    psutil.wait_procs([victim], timeout=30)
    with pytest.raises(EngineDown, match="rank 1"):
        group.check()


@pytest.mark.parametrize("number", [signal.SIGSTOP])
def test_a_hung_rank_is_named_when_its_time_is_up(group, number):
    os.kill(ranks()[1], number)
    with pytest.raises(EngineDown, match=r"rank 1 has not answered for 2 s"):
        group.call("add", 1, 1, timeout=2)


def test_the_time_since_the_question_counts_and_is_named(group):
    os.kill(ranks()[1], signal.SIGSTOP)
    group.send("add", 1, 1)
    with pytest.raises(EngineDown, match=r"rank 1 has not answered for 60 s"):
        group.receive(60, since=time.monotonic() - 59.9)


def test_a_hung_rank_that_takes_no_questions_is_named_too():
    group = make(2, step_timeout=0.5)
    group.start()
    try:
        os.kill(ranks()[1], signal.SIGSTOP)
        with pytest.raises(EngineDown, match=r"rank 1 has taken no question for 0\.5 s"):
            group.send("add", b"x" * 5_000_000, b"y")
    finally:
        group.close()


def test_idle_ranks_are_asked_for_a_sign_of_life_and_go_on_answering():
    group = make(2, heartbeat_timeout=60)
    group.start()
    try:
        for _ in range(3):
            group._pulse._since -= 10  # as long as if it had been idle
            assert group._pulse.due
            group.check()
            look_after(group, lambda: not group._pulse.owing)
            assert group.call("add", 1, 2) == [3, 4]
    finally:
        group.close()


def test_an_answer_that_comes_before_a_late_sign_of_life_is_not_mistaken(group):
    group._pulse.ask([0, 1])
    group.send("deferred", 0.3, "first")
    group.send("ping")
    assert group.receive(5) == ["first", "first"]
    group.send("ping")
    assert group.call("add", 1, 2) == [3, 4]
    assert not group._pulse.owing


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_while_idle_is_noticed(rank):
    group = make(2, heartbeat_timeout=2)  # long enough for the other one
    group.start()
    try:
        os.kill(ranks()[rank], signal.SIGSTOP)
        with pytest.raises(EngineDown, match=rf"rank {rank} has given no sign of life for 2 s"):
            look_after(group)
    finally:
        group.close()


def test_without_a_limit_nobody_is_asked():
    group = make(1, heartbeat_timeout=0)
    group.start()
    try:
        os.kill(ranks()[0], signal.SIGSTOP)
        group._pulse._since -= 1000
        group.check()
    finally:
        group.close()


def test_kill_from_another_thread_ends_a_call(group):
    threading.Timer(0.3, group.kill).start()
    with pytest.raises(EngineDown):
        group.call("sleep", 60)


def test_nothing_is_left_after_close():
    before = os.listdir("/proc/self/fd")
    group = make(2)
    group.start()
    group.close()
    assert ranks() == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_ranks_die_with_their_parent(tmp_path):
    code = (
        "import time\nfrom processes import ranks\n"
        "from backend.config import EngineConfig\nfrom backend.ranks.group import RankGroup\n"
        "group = RankGroup(EngineConfig(model='toy', tensor_parallel=2), 'toy_worker:Toy', lambda line: None)\n"
        "group.start()\ngroup.send('sleep', 60)\nprint(*ranks(), flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
        parent.kill()
    _gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not alive


def test_large_questions_and_large_answers_do_not_keep_each_other_waiting():
    group = make(1, step_timeout=10)
    group.start()
    try:
        for number in range(3):  # none is read while the next is sent
            group.send("add", np.full(300_000, number), 1)
        assert [group.receive(10)[0][0] for _ in range(3)] == [1, 2, 3]
    finally:
        group.close()


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "MALLOC_TRIM_THRESHOLD_", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
def test_what_suits_a_cpu_is_for_ranks_on_one_and_yields_to_the_environment(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    given = {device: environment(EngineConfig(model="toy", device=device), 0).get(name) for device in ("cpu", "cuda")}
    assert int(given["cpu"]) > 0 and given["cuda"] is None
    monkeypatch.setenv(name, "7")
    assert environment(EngineConfig(model="toy", device="cpu"), 0)[name] == "7"
