"""Service against a task without a model: one answer a request whatever fails, and the right one."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from backend.config import EngineConfig
from backend.errors import Cancelled, DeadlineExceeded, EngineDown, InvalidInput, LoadError, ServingError
from backend.tasks import TASKS
from backend.tasks.request import Request
from backend.tasks.service import Service
from backend.tasks.watch import Watch

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))
from processes import ranks  # noqa: E402


class Asked:
    """One request, and every answer that it got."""

    request_id = ""

    def __init__(self, *rows, unsendable=False, timeout=0):
        self._rows, self._unsendable = rows, unsendable
        self.given, self.gone = {"timeout": timeout} if timeout else {}, False
        self.asked_too_late = False
        self.got, self.done = [], threading.Event()

    def parameters(self):
        return self.given

    def cancelled(self):
        self.asked_too_late |= bool(self.got)
        return self.gone

    def rows(self):
        return list(self._rows)

    def answer(self, outputs):
        if self._unsendable:
            raise TypeError("no such tensor")
        self._take(outputs)

    def fail(self, error):
        self._take(error)

    def _take(self, outcome):
        self.got.append(outcome)
        self.done.set()

    def one(self, seconds=20):
        """The answer."""
        assert self.done.wait(seconds), "never answered"
        return self.got[0]

    def doubled(self):
        return self.one()["doubled"].tolist()


def ask(*numbers, how="", **more):
    return Asked({"numbers": list(numbers), "how": how}, **more)


@pytest.fixture(autouse=True)
def _toy_is_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setitem(TASKS, "toy", "toy_task:ToyTask")


@pytest.fixture
def make(tmp_path):
    made = []

    def make(**settings):
        settings = {"device": "cpu", "threads": 1, "restart_backoff": 0.01, "journal": False, **settings}
        lines = []
        made.append(Service("toy", EngineConfig(model=str(tmp_path), **settings), lines.append))
        made[-1].lines = lines
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def service(make):
    service = make()
    service.start()
    return service


def recovered(service):
    deadline = time.monotonic() + 20
    while not service.healthy:
        assert time.monotonic() < deadline, service.lines[-1]
        time.sleep(0.01)
    return service


def test_answers_belong_to_their_requests_and_rows(make):
    service = make(tensor_parallel=2)
    service.start()
    several = Asked({"numbers": [1, 2]}, {"numbers": [3, 4]})
    assert service.tally.proof_difference == 0.25  # of rank 1
    service.serve([several, ask(5, 6, 7, 8), last := ask(9)])
    assert several.doubled() == [[2, 4], [6, 8]]
    assert last.doubled() == [[18]]


def test_a_request_without_pieces_is_answered_too(service):
    service.serve([empty := ask()])
    assert empty.doubled() == [[]]


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("unparsable", InvalidInput, "how is wrong"),
        ("refused", InvalidInput, "too long"),
        ("prepare", ValueError, "prepare broke"),
        ("finish", ValueError, "finish broke"),
    ],
)
def test_a_bad_request_fails_alone(service, how, error, words):
    service.serve([first := ask(1), bad := ask(2, 3, how=how), last := ask(4, 5, 6)])
    with pytest.raises(error, match=words):
        raise bad.one()
    assert first.doubled() == [[2]]
    assert last.doubled() == [[8, 10, 12]]


def test_rows_that_do_not_go_together_fail_their_request_alone(service):
    service.serve([uneven := Asked({"numbers": [1]}, {"numbers": [2, 3]}), good := ask(4)])
    assert isinstance(uneven.one(), InvalidInput)
    assert good.doubled() == [[8]]


@pytest.mark.parametrize("how", ["batch", "join", "fewer", "lost"])
def test_a_fault_of_the_task_fails_its_job_and_leaves_the_ranks_alone(service, how):
    service.serve([bad := ask(1, 2, 3, 4, 5, how=how)])
    assert isinstance(bad.one(), Exception)
    service.serve([good := ask(6)])
    assert good.doubled() == [[12]]
    assert service.tally.restarts == 0
    assert len(bad.got) == 1


def sizes(service, monkeypatch):
    """How many pieces each micro-batch has, from now on."""
    found, batch = [], service.task.batch
    monkeypatch.setattr(service.task, "batch", lambda pieces: found.append(len(pieces)) or batch(pieces))
    return found


def test_what_comes_while_the_ranks_compute_shares_micro_batches(service, monkeypatch):
    found = sizes(service, monkeypatch)
    service.serve([first := ask(1, how="slow")])
    time.sleep(0.1)  # it is under way
    asked = [ask(number) for number in range(6)]
    for each in asked:
        service.serve([each])
    assert [each.doubled() for each in asked] == [[[2 * number]] for number in range(6)]
    assert first.doubled() == [[2]]
    assert found == [1, 3, 3]


def test_a_request_is_answered_as_soon_as_its_own_pieces_are(service):
    service.serve([small := ask(1), large := ask(*range(9), how="slow")])
    small.one()
    assert not large.got
    assert len(large.doubled()[0]) == 9


def test_a_fault_in_a_micro_batch_fails_those_in_it_and_no_others(service):
    service.serve([first := ask(1, how="slow")])
    time.sleep(0.1)
    service.serve([good := ask(1, 2, 3), with_it := ask(4), bad := ask(5, how="batch"), beside := ask(6)])
    assert good.doubled() == [[2, 4, 6]]
    assert {str(each.one()) for each in (with_it, bad, beside)} == {"batch broke"}
    assert first.doubled() == [[2]]


def test_an_answer_that_cannot_be_sent_becomes_an_error(service):
    service.serve([bad := ask(1, unsendable=True), good := ask(2)])
    assert isinstance(bad.one(), TypeError)
    assert good.doubled() == [[4]]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", r"ValueError at fakes/toy_task\.py:\d+ forward"),
        ("die", "exit status 3"),
        ("hang", "not answered for 0.5 s"),
    ],
)
def test_a_failure_of_the_ranks_ends_what_they_had_and_they_serve_again(make, how, words):
    service = make(step_timeout=0.5 if how == "hang" else 20.0, tensor_parallel=2)
    service.start()
    service.serve([bad := ask(1, how=how), with_it := ask(5)])
    for each in (bad, with_it):
        with pytest.raises(EngineDown, match=words):
            raise each.one()
    recovered(service).serve([good := ask(6)])
    assert good.doubled() == [[12]]
    assert [len(each.got) for each in (bad, with_it, good)] == [1, 1, 1]


def test_what_only_waited_for_dead_ranks_is_served_by_the_next(make):
    service = make(restart_backoff=0.5)
    service.start()
    service.serve([slow := ask(0, how="slow")])
    time.sleep(0.1)  # it is under way
    service.serve([bad := ask(1, how="die")])
    waiting = [ask(number, number, number) for number in range(6)]
    late = ask(7, timeout=600_000)
    threads = [threading.Thread(target=service.serve, args=([each],)) for each in [*waiting, late]]
    for thread in threads:
        thread.start()
    with pytest.raises(EngineDown, match="exit status 3; the model is restarting"):
        raise bad.one()
    assert isinstance(late.one(), (DeadlineExceeded, EngineDown))
    for thread in threads:
        thread.join(20)
    kept = [number for number, each in enumerate(waiting) if not isinstance(each.one(), EngineDown)]
    assert len(kept) >= 3  # the ranks had five pieces beside the bad one at most
    assert [waiting[number].doubled() for number in kept] == [[[2 * number] * 3] for number in kept]
    assert {len(each.got) for each in [slow, bad, late, *waiting]} == {1}
    assert not service._sent and not service._pool.clear()


def test_what_waits_while_the_ranks_die_is_answered_once(service):
    """One computing, one in the queue, one whose caller is blocked."""
    asked = [ask(1, how="slow") for _ in range(6)] + [ask(2, how="die")] + [ask(3) for _ in range(4)]
    threads = [threading.Thread(target=service.serve, args=([each],)) for each in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for each in asked:
        each.one()
    assert {len(each.got) for each in asked} == {1}
    assert any(isinstance(each.got[0], EngineDown) for each in asked)


def test_a_time_limit_ends_what_waits_and_what_is_computed_and_no_neighbour(service, monkeypatch):
    found = sizes(service, monkeypatch)
    service.serve([late := ask(*range(30), how="slow", timeout=250_000), fine := ask(1), easy := ask(2, timeout=10**9)])
    with pytest.raises(DeadlineExceeded, match="time limit"):
        raise late.one()
    assert fine.doubled() == [[2]] and easy.doubled() == [[4]]
    computed = sum(found)
    service.serve([after := ask(3)])
    assert after.doubled() == [[6]]
    assert sum(found) == computed + 1 < 32
    assert [len(each.got) for each in (late, fine, easy, after)] == [1, 1, 1, 1]


def test_a_time_limit_holds_while_a_rank_hangs(service):
    service.serve([late := ask(1, how="hang", timeout=200_000)])
    assert isinstance(late.one(5), DeadlineExceeded)


def test_who_has_gone_is_computed_no_more(service, monkeypatch):
    found = sizes(service, monkeypatch)
    service.serve([gone := ask(*range(30), how="slow"), fine := ask(1)])
    gone.gone = True
    assert isinstance(gone.one(5), Cancelled)
    assert fine.doubled() == [[2]]
    service.serve([after := ask(3)])
    assert after.doubled() == [[6]]
    assert sum(found) < 32
    time.sleep(0.3)
    assert not any(each.asked_too_late for each in (gone, fine, after))


@pytest.mark.parametrize("limit", ["soon", -1, 0.5])
def test_a_time_limit_that_is_none_is_refused(service, limit):
    service.serve([bad := ask(1, timeout=limit), good := ask(2)])
    with pytest.raises(InvalidInput, match="timeout must be microseconds"):
        raise bad.one()
    assert good.doubled() == [[4]]


def test_many_open_requests_are_all_asked_in_turn():
    watch, requests = Watch(), [Request(ask(number)) for number in range(130)]
    watch.add(requests)
    for each in requests[::2]:
        each.asked.gone = True
    for _ in range(5):
        watch._look()
    assert [request.settled for request in requests] == [True, False] * 65


def test_a_death_while_idle_is_noticed(service):
    os.kill(ranks()[0], signal.SIGKILL)
    while service.healthy:
        time.sleep(0.01)
    recovered(service).serve([good := ask(1)])
    assert good.doubled() == [[2]]


def test_ranks_that_cannot_be_started_again_leave_the_model_down(make):
    service = make(max_restarts=2, max_waiting=8)
    service.start()
    service.serve([bad := ask(1, how="die")])
    assert isinstance(bad.one(), EngineDown)
    while "for good" not in service.lines[-1]:
        time.sleep(0.01)
    service.serve([late := ask(1)])
    with pytest.raises(EngineDown, match="failed for good"):
        raise late.one()
    assert not service.healthy
    assert service.lines[-1] == "has failed for good (rank 0 ended with exit status 3)"


def test_a_job_that_slips_in_when_all_is_lost_is_failed(make, monkeypatch):
    service = make(max_restarts=0)
    service.start()
    service.serve([ask(1, how="die")])
    while "for good" not in service.lines[-1]:
        time.sleep(0.01)
    monkeypatch.setattr(service._life, "check", lambda: None)  # as if it had looked a moment earlier
    service.serve([late := ask(1)])
    assert isinstance(late.one(), EngineDown)


def test_what_slips_in_during_a_restart_is_served_after_it(make, monkeypatch):
    service = make(restart_backoff=0.3)
    service.start()
    service.serve([ask(1, how="die")])
    while service.healthy:
        time.sleep(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(service._life, "check", lambda: None)  # as if it had looked a moment earlier
        service.serve([late := ask(1)])
    assert late.doubled() == [[2]]


def test_close_answers_what_is_open_and_what_comes_later(make, monkeypatch):
    service = make()
    service.start()
    asked = [ask(*range(30), how="slow") for _ in range(4)]
    threads = [threading.Thread(target=service.serve, args=([each],)) for each in asked]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    service.close()
    for thread in threads:
        thread.join(20)
    for each in asked:
        with pytest.raises(EngineDown, match="unloaded"):
            raise each.one()
    monkeypatch.setattr(service._life, "check", lambda: None)
    service.serve([late := ask(1)])
    assert isinstance(late.one(), EngineDown)
    assert {len(each.got) for each in [*asked, late]} == {1}
    assert ranks() == []


def test_close_while_loading_ends_the_start(make):
    service = make(max_waiting=7)
    threading.Timer(0.3, service.close).start()
    with pytest.raises((EngineDown, LoadError)):
        service.start()
    service.serve([late := ask(1)])
    assert isinstance(late.one(), EngineDown)
    assert not service.healthy


def test_close_beside_a_hung_rank_does_not_wait_for_it(make, monkeypatch):
    monkeypatch.setattr("backend.ranks.lifecycle.CLOSING", 0.3)
    service = make(tensor_parallel=2)
    service.start()
    service.serve([open_ := ask(1, how="hang")])
    time.sleep(1.0)  # rank 1 has answered: the thread waits for rank 0
    service.close()
    assert isinstance(open_.one(1), EngineDown)


def test_the_backoff_of_a_model_that_keeps_failing_stays_a_number(make):
    service = make(restart_backoff=0.0, max_restarts=9999)
    service.start()
    service._life._restarts.failures = 5000
    service.serve([ask(1, how="die")])
    while service.healthy:
        time.sleep(0.01)
    recovered(service)


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_from_several_threads_get_what_each_gets_alone(make, seed):
    service, rng = make(), random.Random(seed)
    service.start()
    hows = ["", "", "", "", "deferred", "finish", "refused", "unparsable"]
    batches = [[_random(rng, hows) for _ in range(rng.randint(1, 6))] for _ in range(40)]
    threads = [threading.Thread(target=_serve_all, args=(service, batches[at::3])) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for each in [each for batch in batches for each in batch]:
        _check(each)


def _random(rng, hows):
    return ask(*(rng.randint(0, 99) for _ in range(rng.randint(0, 9))), how=rng.choice(hows))


def _serve_all(service, batches):
    for batch in batches:
        service.serve(batch)


def _check(asked):
    outcome, (row,) = asked.one(), asked.rows()
    assert len(asked.got) == 1
    if row["how"] in ("", "deferred"):
        np.testing.assert_array_equal(outcome["doubled"], [[2.0 * number for number in row["numbers"]]])
    else:
        assert isinstance(outcome, (ServingError, ValueError))
