"""The service against a decoder without a model: each caller gets its text and exactly one end, whatever happens."""

import sys
import threading
import time
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest

from backend.config import EngineConfig
from backend.errors import Cancelled, EngineDown, InvalidInput
from backend.generation import delivery
from backend.generation.service import Service

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))
from counting_decoder import CRASH, NAN, SLOW, VOCAB, truth  # noqa: E402
from tiny import save_llama  # noqa: E402

WORKER = "counting_decoder:CountingDecoder"


class Caller:
    """A request, and all that came back; a second end is an error."""

    request_id = ""

    def __init__(self, *ids, **fields):
        self.fields = {"input_ids": list(ids), "max_tokens": 20, "temperature": 0.0, "ignore_eos": True,
                       "exclude_input_in_output": True, **fields}  # fmt: skip
        self.answers, self.error, self.ends, self.gone = [], None, 0, False
        self.over, self.asked_late, self.sending = threading.Event(), False, threading.Lock()

    def rows(self):
        if isinstance(self.fields["input_ids"], Exception):
            raise self.fields["input_ids"]
        return [self.fields]

    def parameters(self):
        return {}

    def cancelled(self):
        self.asked_late |= self.over.is_set()
        return self.gone

    def send(self, outputs):
        assert self.sending.acquire(blocking=False), "two senders at once"
        self.answers.append(outputs)
        self.sending.release()

    def answer(self, outputs):
        self.send(outputs)
        self.end()

    def end(self):
        self.ends += 1
        self.over.set()

    def fail(self, error):
        self.error = error
        self.end()

    def wait(self):
        assert self.over.wait(30)
        return self

    @property
    def text(self):
        return b"".join(row for outputs in self.answers for row in outputs["text_output"][:, 0].tolist()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB + 100)


@pytest.fixture(scope="module")
def service(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES))
        patch.setenv("TRITONSPEED_PYTHON", sys.executable)
        yield from made(folder)


def made(folder):
    config = EngineConfig(model=str(folder), device="cpu", threads=1, restart_backoff=0.05)
    service = Service(config, lambda line: None, WORKER)
    service.start()
    yield service
    service.close()


def expected(service, *ids, tokens=20):
    return service.engine.tokenizer.decode(truth(ids, tokens, ()))


def test_streams_and_whole_answers_give_the_same_text(service):
    callers = [Caller(5 + i % 20, stream=i % 2 == 0) for i in range(100)]
    service.serve(callers)
    for i, caller in enumerate(callers):
        caller.wait()
        assert (caller.text, caller.error, caller.ends) == (expected(service, 5 + i % 20), None, 1)
    assert all(len(caller.answers) == 1 for caller in callers[1::2])
    assert open_requests(service) == 0


def test_a_stream_counts_its_tokens_and_tells_the_reason_once(service):
    caller = Caller(
        SLOW, 5, stream=True, n=3, return_finish_reason=True, return_num_output_tokens=True, stop_words=["zzz"]
    )
    service.serve([caller])
    caller.wait()
    rows = [(outputs["index"][i, 0], outputs["num_output_tokens"][i, 0], outputs["finish_reason"][i, 0])
            for outputs in caller.answers for i in range(len(outputs["index"]))]  # fmt: skip
    assert all(len(outputs["index"]) for outputs in caller.answers)
    for index in range(3):
        assert sum(count for at, count, _ in rows if at == index) == 20
        assert [reason for at, _, reason in rows if at == index and reason] == [b"length"]


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"input_ids": InvalidInput("the tensors are torn")}])
def test_what_cannot_be_served_fails_alone(service, fields):
    wrong, right = Caller(5, **fields), Caller(5)
    service.serve([wrong, right])
    assert isinstance(wrong.wait().error, InvalidInput) and wrong.ends == 1 and not wrong.answers
    assert right.wait().text == expected(service, 5)


def test_a_failure_while_running_comes_after_the_text_before_it(service):
    caller = Caller(NAN, stream=True)
    service.serve([caller])
    assert "not finite" in str(caller.wait().error) and caller.ends == 1
    assert open_requests(service) == 0


def test_a_caller_that_went_away_is_cancelled_and_never_asked_again(service):
    callers = [Caller(SLOW, 5, max_tokens=400, stream=stream) for stream in (True, False)]
    service.serve(callers)
    eventually(lambda: callers[0].answers)
    for caller in callers:
        caller.gone = True
        assert isinstance(caller.wait().error, Cancelled) and caller.ends == 1
    assert open_requests(service) == 0
    assert not any(caller.asked_late for caller in callers)


def test_a_way_back_that_is_broken_ends_its_request_only(service, caplog):
    broken, right = Caller(5, stream=True), Caller(6)
    broken.send = broken.fail = broken.answer = lambda *given: 1 / 0
    service.serve([broken, right])
    assert right.wait().text == expected(service, 6)
    assert open_requests(service) == 0
    assert "could not be answered" in caplog.text


def test_what_comes_after_the_end_is_refused(tmp_path):
    """It may: a model that has left by itself has not been told by its server."""
    ended = Service(EngineConfig(model=str(save_llama(tmp_path)), device="cpu"), lambda line: None, WORKER)
    ended.close()
    caller = Caller(5)
    ended.serve([caller])
    assert isinstance(caller.wait().error, EngineDown) and caller.ends == 1
    ended.close()


def test_dead_ranks_fail_every_caller_and_the_next_one_is_served(service):
    callers = [Caller(SLOW, 5, max_tokens=400, stream=True), Caller(CRASH)]
    service.serve(callers[:1])
    eventually(lambda: callers[0].answers)  # one that has not begun would be kept for the next ranks
    service.serve(callers[1:])
    assert all(isinstance(caller.wait().error, EngineDown) and caller.ends == 1 for caller in callers)
    eventually(lambda: service.healthy)
    service.serve([after := Caller(5)])
    assert after.wait().text == expected(service, 5)


def test_closing_ends_what_is_open(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)
    service = next(made(folder))
    callers = [Caller(SLOW, 5 + i, max_tokens=400, stream=i % 2 == 0) for i in range(10)]
    service.serve(callers)
    eventually(lambda: callers[0].answers)
    service.close()
    assert all(isinstance(caller.error, EngineDown) and caller.ends == 1 for caller in callers)
    assert not any(thread.is_alive() for thread in service._threads)


# ---- the pace of one delivery, with a clock that stands still


class Mailbox:
    """A stream as a delivery sees it."""

    def __init__(self):
        self.mail, self.done = [], False

    @property
    def waiting(self):
        return bool(self.mail)

    def take(self):
        taken, self.mail = self.mail, []
        return taken


class Pace:
    """A delivery whose request answers with the news themselves."""

    def __init__(self, monkeypatch, stream=True):
        self.now, self.outbox, self.later, self.caller = 100.0, [], [], Caller(5)
        monkeypatch.setattr(delivery.time, "monotonic", lambda: self.now)
        options = type("Options", (), {"stream": stream})
        request = type(
            "Request", (), {"options": options, "answer": staticmethod(lambda news: {"news": news} if stream else None)}
        )
        self.delivery = delivery.Delivery(request, self.caller, self.outbox.append, lambda *due: self.later.append(due))
        self.delivery.stream = self.stream = Mailbox()
        self.delivery.release()

    def news(self, item, ended=False):
        self.stream.mail.append(item)
        self.delivery.notify(ended)

    def wake(self):
        """What the thread that wakes does by now."""
        due = [each for each in self.later if each[0] <= self.now]
        self.later[:] = [each for each in self.later if each not in due]
        for _, each in due:
            each.wake()

    def sent(self):
        """What a sender finds to send now."""
        while self.outbox:
            self.outbox.pop()
            self.delivery.send(interval=0.5)
        sent, self.caller.answers = self.caller.answers, []
        return [outputs["news"] for outputs in sent]


def test_the_first_news_go_at_once_and_later_ones_together_after_the_interval(monkeypatch):
    pace = Pace(monkeypatch)
    pace.news("a")
    assert pace.sent() == [["a"]]
    for item in "bc":
        pace.news(item)
    assert pace.sent() == []
    pace.now += 0.5
    pace.news("d")
    assert pace.sent() == [["b", "c", "d"]]


def test_a_sender_that_is_late_makes_the_caller_miss_no_later_step(monkeypatch):
    pace = Pace(monkeypatch)
    pace.news("a")
    pace.now += 0.2  # "a" waits in the outbox
    assert pace.sent() == [["a"]]
    pace.now += 0.4  # 0.6 after "a" came, 0.4 after it went
    pace.news("b")
    assert pace.sent() == [["b"]]
    pace.now += 0.45
    pace.news("c")
    assert pace.sent() == []
    pace.now += 0.05
    pace.news("d")
    pace.now += 0.4  # so late that half an interval's rest is longer
    assert pace.sent() == [["c", "d"]]
    pace.now += 0.2
    pace.news("e")
    assert pace.sent() == []
    pace.now += 0.05
    pace.news("f")
    assert pace.sent() == [["e", "f"]]


def test_news_that_come_too_early_go_when_they_are_due_and_not_with_the_next(monkeypatch):
    pace = Pace(monkeypatch)
    pace.news("a")
    assert pace.sent() == [["a"]]
    for item in "bc":
        pace.now += 0.2
        pace.news(item)
        assert pace.sent() == [] and len(pace.later) == 1
    pace.now += 0.1
    pace.wake()
    assert pace.later == [] and pace.sent() == [["b", "c"]]
    pace.now += 0.45  # the interval is from when they went
    pace.news("d")
    assert pace.sent() == []
    pace.now += 0.05
    pace.wake()
    assert pace.sent() == [["d"]]


def test_news_that_come_while_others_are_being_sent_are_not_left_behind(monkeypatch):
    pace = Pace(monkeypatch)
    later = ["b"]
    usual = pace.caller.send
    pace.caller.send = lambda outputs: (usual(outputs), later and pace.news(later.pop()))
    pace.news("a")
    assert pace.sent() == [["a"]]
    assert [due for due, _ in pace.later] == [pace.now + 0.5]
    pace.now += 0.5
    pace.wake()
    assert pace.sent() == [["b"]]


def test_who_is_woken_too_early_because_others_went_meanwhile_is_woken_again(monkeypatch):
    pace = Pace(monkeypatch)
    pace.news("a")
    assert pace.sent() == [["a"]]
    pace.now += 0.1
    pace.news("b")  # asks to be woken at 0.5
    pace.delivery.look()
    pace.now += 0.3
    assert pace.sent() == [["b"]]  # now the next ones are due at 0.65
    pace.now += 0.1
    pace.news("c")
    pace.wake()
    assert pace.sent() == [] and len(pace.later) == 1
    pace.now += 0.15
    pace.wake()
    assert pace.sent() == [["c"]]


def test_the_thread_that_wakes_takes_the_earliest_first():
    """As they ask is another order."""
    woken, service = [], Service.__new__(Service)
    service._later = SimpleQueue()
    thread = threading.Thread(target=service._wake)
    thread.start()
    start = time.monotonic()
    for place in (3, 1, 2):
        each = SimpleNamespace(wake=partial(lambda place: woken.append((place, time.monotonic())), place))
        service._later.put((start + 0.05 * place, each))
    eventually(lambda: len(woken) == 3)
    service._later.put(None)
    thread.join(5)
    assert not thread.is_alive()
    assert [place for place, _ in woken] == [1, 2, 3]
    assert all(at >= start + 0.05 * place for place, at in woken)


def test_who_is_woken_for_news_that_have_gone_sends_nothing(monkeypatch):
    pace = Pace(monkeypatch)
    pace.news("a")
    assert pace.sent() == [["a"]]
    pace.news("b")
    pace.news("c", ended=True)
    assert pace.sent() == [["b", "c"]]
    pace.now += 1
    pace.wake()
    assert pace.outbox == [] and pace.sent() == []
    pace.news("d")
    assert pace.sent() == [["d"]]
    pace.news("e")
    assert len(pace.later) == 1, "it can be woken again"


def test_an_end_waits_for_no_interval_even_if_it_comes_while_sending(monkeypatch):
    pace = Pace(monkeypatch)
    pace.news("a")
    assert pace.sent() == [["a"]]
    pace.news("b", ended=True)
    assert pace.sent() == [["b"]]
    pace.now += 1
    pace.caller.send = lambda outputs: (
        pace.caller.answers.append(outputs),
        later and pace.news(later.pop(), ended=True),
    )
    later = ["d"]
    pace.news("c")
    assert pace.sent() == [["c"], ["d"]]


def test_one_place_in_the_outbox_whatever_comes(monkeypatch):
    pace = Pace(monkeypatch)
    for item in "abc":
        pace.news(item, ended=True)
        pace.delivery.look()
    assert len(pace.outbox) == 1
    assert pace.sent() == [["a", "b", "c"]]


def test_news_of_a_whole_answer_are_looked_at_only_when_something_ends(monkeypatch):
    pace = Pace(monkeypatch, stream=False)
    pace.news("a")
    pace.news("b")
    assert pace.outbox == []
    assert pace.later == []
    pace.news("c", ended=True)
    assert len(pace.outbox) == 1


def test_news_left_behind_by_a_slow_engine_go_with_the_next_look(monkeypatch):
    pace = Pace(monkeypatch)
    pace.news("a")
    assert pace.sent() == [["a"]]
    pace.news("b")
    assert pace.sent() == []
    pace.delivery.look()
    assert pace.sent() == [["b"]]


def test_a_look_without_news_sends_nothing(monkeypatch):
    pace = Pace(monkeypatch)
    pace.delivery.look()
    assert len(pace.outbox) == 1 and pace.sent() == []
    pace.news("a")
    assert pace.sent() == [["a"]]


def open_requests(service):
    eventually(lambda: not service._open)
    eventually(lambda: not service.engine.check())
    return len(service._open)


def eventually(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
