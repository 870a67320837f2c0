"""The engine against a decoder without a model, in real rank processes: tokens, order, limits, deaths and restarts."""

import random
import re
import sys
import threading
import time
from array import array
from contextlib import closing
from dataclasses import replace
from math import inf
from pathlib import Path

import psutil
import pytest

from backend.config import EngineConfig
from backend.errors import DeadlineExceeded, EngineDown, InvalidInput, LoadError, Overloaded, ServingError
from backend.generation.engine import Engine
from backend.generation.prompt import Prompt
from backend.generation.sequence import SamplingParams

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))
from counting_decoder import CRASH, END, HANG, NAN, SLOW, VOCAB, truth  # noqa: E402
from processes import ranks  # noqa: E402
from tiny import save_llama  # noqa: E402

WORKER = "counting_decoder:CountingDecoder"
PARAMS = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=frozenset({END}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB + 100)


@pytest.fixture
def make(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)
    engines = []

    def make(**parameters):
        config = EngineConfig(
            **{"model": str(folder), "device": "cpu", "threads": 1, "restart_backoff": 0.05, **parameters}
        )
        engines.append(engine := Engine(config, lines.append, WORKER))
        engine.lines = lines
        engine.start()
        return engine

    lines = []
    yield make
    for engine in engines:
        engine.close()
    assert ranks() == []


def prompt(*ids, params=PARAMS, **more):
    return Prompt(array("i", ids), params, **more)


def complete(engine, *prompts):
    """Token ids and finish reason of every sequence."""
    tokens, reasons = {}, {}
    for deltas in engine.run(list(prompts), timeout=30):
        for delta in deltas:
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
            reasons[delta.index] = delta.finish_reason
    return [(tokens[index], reasons[index]) for index in sorted(tokens)]


def expected(ids, params=PARAMS):
    tokens = truth(ids, params.max_tokens)
    return tokens, "stop" if tokens[-1] == END else "length"


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_many_prompts_at_once_give_the_tokens_of_one_at_a_time(make, ahead, world):
    engine = make(run_ahead=ahead, tensor_parallel=world, step_tokens=48, max_sequences=6)
    rng = random.Random(1)
    stem = [rng.randrange(3, 150) for _ in range(60)]
    prompts = [[*stem[: rng.randrange(1, 60)], rng.randrange(3, 150)] for _ in range(40)]
    assert complete(engine, *(prompt(*ids) for ids in prompts)) == [expected(ids) for ids in prompts]
    assert open_sequences(engine) == 0


def test_a_cache_too_small_for_all_preempts_and_still_gives_the_same_tokens(make):
    engine = make(num_blocks=24, block_size=4, max_model_len=80, step_tokens=32)
    rng = random.Random(2)
    prompts = [[rng.randrange(3, 150) for _ in range(rng.randrange(1, 50))] for _ in range(25)]
    assert complete(engine, *(prompt(*ids) for ids in prompts)) == [expected(ids) for ids in prompts]
    assert engine.tally.preemptions > 0


def test_samples_of_a_prompt_are_indexed_and_share_its_blocks(make):
    engine = make()
    ids = list(range(10, 90))
    results = complete(engine, prompt(5, 6, 7, n=2), prompt(*ids, n=3))
    assert results == [expected([5, 6, 7])] * 2 + [expected(ids)] * 3
    assert engine.tally.prefix_hits >= 2 * 64


def test_without_the_prefix_cache_requests_share_nothing(make):
    engine = make(prefix_cache=False)
    ids = list(range(10, 90))
    for _ in range(2):
        assert complete(engine, prompt(*ids)) == [expected(ids)]
    assert engine.tally.prefix_queries == 160 and engine.tally.prefix_hits == 0


def test_max_tokens_never_passes_the_models_length(make):
    engine = make(max_model_len=64)
    ((tokens, reason),) = complete(
        engine, prompt(*range(10, 70), params=replace(PARAMS, max_tokens=1000, stop_token_ids=frozenset()))
    )
    assert (len(tokens), reason) == (4, "length")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the prompt has 0 tokens, the limit is 63"),
        (range(3, 67), "the prompt has 64 tokens, the limit is 63"),
        ([3, VOCAB], f"token id {VOCAB} is not in the vocabulary of {VOCAB}"),
        ([-1, 3], "token id -1"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_by_name(make, ids, message):
    engine = make(max_model_len=64)
    with pytest.raises(InvalidInput, match=message):
        complete(engine, prompt(*ids))
    assert len(complete(engine, prompt(*range(3, 66)))[0][0]) == 1


def test_one_past_the_queue_is_overloaded_and_the_queued_ones_finish(make):
    engine = make(max_sequences=1, max_waiting=2)
    slow = replace(PARAMS, max_tokens=30, stop_token_ids=frozenset())
    threads, results = [], []
    for _ in range(3):  # one runs, two wait
        threads.append(threading.Thread(target=lambda: results.append(complete(engine, prompt(SLOW, params=slow)))))
        threads[-1].start()
        time.sleep(0.05)
    with pytest.raises(Overloaded, match="the limit is 3"):
        complete(engine, prompt(5))
    for thread in threads:
        thread.join()
    assert results == [[(truth([SLOW], 30, ()), "length")]] * 3


@pytest.mark.parametrize("queued", [False, True])
def test_a_deadline_ends_a_request_running_or_queued(make, queued):
    engine = make(max_sequences=1)
    long = replace(PARAMS, max_tokens=400, stop_token_ids=frozenset())
    with closing(engine.run([prompt(SLOW, params=long)], timeout=30)) as neighbour:
        next(neighbour) if queued else neighbour.close()
        ids = [7] if queued else [SLOW, SLOW]
        with pytest.raises(DeadlineExceeded):
            complete(engine, prompt(*ids, params=replace(long, max_tokens=200), timeout=0.2))
    assert complete(engine, prompt(5)) == [expected([5])]


def test_leaving_a_stream_frees_its_place(make):
    engine = make(max_sequences=1)
    with closing(engine.run([prompt(SLOW, params=replace(PARAMS, max_tokens=400))], timeout=30)) as stream:
        next(stream)
    assert complete(engine, prompt(5)) == [expected([5])]
    assert open_sequences(engine) == 0


def test_a_row_of_broken_logits_fails_alone(make):
    engine = make()
    results = []
    neighbour = threading.Thread(target=lambda: results.append(complete(engine, prompt(SLOW, 9))))
    neighbour.start()
    with pytest.raises(ServingError, match="not finite"):
        complete(engine, prompt(5, NAN))
    neighbour.join()
    assert results == [[expected([SLOW, 9])]]


def test_a_killed_rank_fails_every_stream_and_the_engine_serves_again(make):
    engine = make(tensor_parallel=2)
    pids = ranks()
    failures = []

    def neighbour():
        try:
            complete(engine, prompt(SLOW, params=replace(PARAMS, max_tokens=400, stop_token_ids=frozenset())))
        except EngineDown as error:
            failures.append(str(error))

    threads = [threading.Thread(target=neighbour) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    with pytest.raises(EngineDown, match="was killed by SIGKILL"):
        complete(engine, prompt(CRASH))
    for thread in threads:
        thread.join()
    assert len(failures) == 4 and time.monotonic() - start < 5
    await_health(engine)
    assert complete(engine, prompt(5)) == [expected([5])]
    assert len(pids) == 2 and not set(pids) & set(ranks()) and not any(map(psutil.pid_exists, pids))


class Kept:
    """A rank is told to die while three requests wait: one gets no time, one will be left, one has several samples."""

    def __init__(self, engine):
        self.engine, self.tokens, self.bell = engine, {}, threading.Event()
        self.bad = engine.open([prompt(*[SLOW] * 20, CRASH)], lambda ended: None)
        self.late = engine.open([prompt(5, timeout=1.5)], lambda ended: None)
        self.left = engine.open([prompt(6)], lambda ended: None)
        self.good = engine.open([prompt(*range(10, 60), n=2), prompt(7)], lambda ended: self.bell.set())

    def leave(self):
        for stream in (self.bad, self.late, self.left, self.good):
            self.engine.leave(stream)

    def answers(self):
        while not self.good.done:
            assert self.bell.wait(20)
            self.bell.clear()
            for delta in self.good.take():
                self.tokens.setdefault(delta.index, []).extend(delta.token_ids)
        return [tokens for _, tokens in sorted(self.tokens.items())]


def test_what_only_waited_for_a_killed_rank_is_served_by_the_next(make):
    engine = make(max_sequences=1, restart_backoff=3.0)
    kept = Kept(engine)
    with pytest.raises(EngineDown, match="was killed by SIGKILL; the model is restarting"):
        taken(kept.bad)
    engine.leave(kept.left)
    assert not engine.healthy and not kept.good.waiting
    with pytest.raises(DeadlineExceeded):
        taken(kept.late)
    assert not engine.healthy  # it was told in the pause
    assert engine.check() == 3  # nor does who has gone wait
    with pytest.raises(EngineDown, match="is restarting"):
        engine.open([prompt(5)], lambda ended: None)
    stem = list(range(10, 60))
    assert kept.answers() == [expected(ids)[0] for ids in (stem, stem, [7])]
    for stream in (kept.bad, kept.late, kept.good):
        engine.leave(stream)
    assert open_sequences(engine) == 0 and engine._admission.sequences == 0
    assert [engine.tally.finished[reason] for reason in ("error", "deadline", "cancelled")] == [1, 1, 1]


def test_a_request_with_one_sample_done_is_not_kept(make):
    engine = make(max_sequences=1)
    one = replace(PARAMS, max_tokens=1)
    stream = engine.open([prompt(5, params=one), prompt(CRASH), prompt(6)], lambda ended: None)
    with pytest.raises(EngineDown, match="SIGKILL"):
        taken(stream)
    engine.leave(stream)
    await_health(engine)
    assert open_sequences(engine) == 0


def test_what_waits_ends_when_the_model_has_failed_for_good(make, folder):
    engine = make(max_sequences=1, max_restarts=1)
    (folder / "refuse").touch()
    try:
        kept = Kept(engine)
        with pytest.raises(EngineDown, match="failed for good"):
            taken(kept.good)
        assert engine.check() == 0  # on a busy machine the late one's own limit ends it first
        ended = engine.tally.finished
        assert ended["error"] + ended["deadline"] == 6 and ended["deadline"] <= 1
        kept.leave()
    finally:
        (folder / "refuse").unlink()


def test_what_no_longer_fits_after_a_restart_is_told_so(make, monkeypatch):
    engine = make(max_sequences=1)
    monkeypatch.setattr("backend.generation.engine.share", lambda config, capacities: (4, 60))
    kept = Kept(engine)
    with pytest.raises(EngineDown, match="room for 60 tokens only"):
        taken(kept.good)
    kept.leave()
    await_health(engine)
    assert open_sequences(engine) == 0 and complete(engine, prompt(5)) == [expected([5])]


def test_a_rank_killed_while_idle_is_noticed_without_traffic(make):
    engine = make()
    psutil.Process(ranks()[0]).kill()
    deadline = time.monotonic() + 10
    while not engine.tally.restarts and time.monotonic() < deadline:
        time.sleep(0.05)
    await_health(engine)
    assert complete(engine, prompt(5)) == [expected([5])]


def test_a_hung_rank_is_replaced_after_step_timeout(make):
    engine = make(step_timeout=1.0)
    with pytest.raises(EngineDown, match="has not answered for 1 s"):
        complete(engine, prompt(HANG))
    await_health(engine)
    assert complete(engine, prompt(5)) == [expected([5])]


def test_after_max_restarts_it_stays_down_with_the_reason(make, folder):
    engine = make(max_restarts=2, restart_backoff=0.01)
    (folder / "refuse").touch()
    try:
        with pytest.raises(EngineDown):
            complete(engine, prompt(CRASH))
        deadline = time.monotonic() + 20
        while "for good" not in engine.lines[-1] and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(EngineDown, match="failed for good"):
            complete(engine, prompt(5))
        assert sum("told to refuse" in line for line in engine.lines) >= 2
    finally:
        (folder / "refuse").unlink()


def test_a_model_that_cannot_load_says_why_and_leaves_no_rank(make, folder):
    (folder / "refuse").touch()
    try:
        with pytest.raises(LoadError, match="told to refuse"):
            make()
    finally:
        (folder / "refuse").unlink()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_model_len": 513}, "max_model_len 513 is more than the model's 512"),
        ({"max_model_len": 100, "num_blocks": 6}, "the KV cache would hold 96 tokens, max_model_len is 100"),
    ],
)
def test_a_length_that_does_not_fit_is_refused(make, parameters, message):
    with pytest.raises(LoadError, match=message):
        make(**parameters)


def test_stop_strings_end_a_sequence_and_the_text_is_that_of_its_tokens(make):
    engine = make()
    free = replace(PARAMS, max_tokens=40, stop_token_ids=frozenset())
    text = "".join(d.text for deltas in engine.run([prompt(5, params=free)]) for d in deltas)
    assert text == engine.tokenizer.decode(truth([5], 40, ()))
    stop = text[10:13]
    stopped = [d for deltas in engine.run([prompt(5, params=replace(free, stop=(stop,)))]) for d in deltas]
    assert "".join(d.text for d in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"


def test_logprobs_come_only_where_asked_for(make):
    engine = make()
    asked, plain = (
        next(engine.run([prompt(5, params=replace(PARAMS, max_tokens=1, logprobs=wish))]))[0] for wish in (True, False)
    )
    assert asked.logprobs == pytest.approx([-asked.token_ids[0] / 100]) and asked.cumulative_logprob == pytest.approx(
        asked.logprobs[0]
    )
    assert plain.logprobs is None


def test_a_stop_string_on_the_last_permitted_token_is_a_stop(make):
    engine = make()
    free = replace(PARAMS, max_tokens=40, stop_token_ids=frozenset())
    text = "".join(d.text for deltas in engine.run([prompt(5, params=free)]) for d in deltas)
    short = replace(free, max_tokens=3)
    last = engine.tokenizer.decode(truth([5], 3, ()))[-1]
    assert text.index(last) >= len(engine.tokenizer.decode(truth([5], 2, ())))
    *_, end = (d for deltas in engine.run([prompt(5, params=replace(short, stop=(last,)))]) for d in deltas)
    assert end.finish_reason == "stop"


def test_admission_counts_sequences_not_requests(make):
    engine = make(max_sequences=2, max_waiting=6)
    slow = replace(PARAMS, max_tokens=200, stop_token_ids=frozenset())
    with closing(engine.run([prompt(SLOW, params=slow, n=6)], timeout=30)) as first:
        next(first)
        with pytest.raises(Overloaded, match=r"6 sequences are running or waiting, the limit is 8"):
            complete(engine, prompt(5, n=3))
        assert complete(engine, prompt(5, n=2, priority=-1)) == [expected([5])] * 2
    assert open_sequences(engine) == 0
    assert complete(engine, prompt(5, n=8)) == [expected([5])] * 8


def test_a_deadline_holds_while_a_rank_hangs_and_close_does_not_wait_for_it(make):
    engine = make(step_timeout=60.0)
    with pytest.raises(DeadlineExceeded):
        complete(engine, prompt(HANG, timeout=0.3))
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 10
    with pytest.raises(EngineDown, match="unloaded"):
        complete(engine, prompt(5))


def test_priority_orders_admission(make):
    engine = make(max_sequences=1)
    order = []
    with closing(
        engine.run([prompt(SLOW, params=replace(PARAMS, max_tokens=30, stop_token_ids=frozenset()))], timeout=30)
    ) as first:
        next(first)
        threads = []
        for priority in (2, 1, 0):
            ask = lambda p=priority: (complete(engine, prompt(5, priority=p, timeout=inf)), order.append(p))  # noqa: E731
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            time.sleep(0.05)
        for _ in first:
            pass
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2]


def taken(stream, seconds=20):
    """Take until something is raised."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stream.take()
        time.sleep(0.01)


def open_sequences(engine, seconds=5):
    """What is left once the engine has had time to notice that a caller went; checks the books."""
    deadline = time.monotonic() + seconds
    while (left := engine.check()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def await_health(engine, seconds=20):
    deadline = time.monotonic() + seconds
    while not engine.healthy and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.healthy


def test_a_queue_longer_than_allowed_refuses_with_its_length(make):
    engine = make(max_sequences=1, max_queue_seconds=0.2)
    slow = replace(PARAMS, max_tokens=12, stop_token_ids=frozenset())
    threads = [threading.Thread(target=complete, args=(engine, prompt(SLOW, params=slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline, refusal = time.monotonic() + 20, None
    while refusal is None and time.monotonic() < deadline and any(thread.is_alive() for thread in threads):
        try:
            engine.leave(engine.open([prompt(5, priority=1)], lambda ended: None))
            time.sleep(0.05)
        except Overloaded as error:
            refusal = str(error)
    for thread in threads:
        thread.join()
    pattern = r"longer than 0.2 s \(max_queue_seconds\); \d+ requests wait .* for about \d+\.\d s; try again later"
    assert refusal and re.search(pattern, refusal), refusal
    assert complete(engine, prompt(5)) == [expected([5])]
    assert (engine._forecast.requests, engine._forecast.seconds) == (0, 0.0)


@pytest.mark.parametrize("target", [0.001, 1000.0])
def test_with_targets_the_tokens_are_the_same(make, target):
    engine = make(target_itl_ms=target, target_ttft_ms=1.0, kv_headroom=0.5, step_tokens=64, block_size=4)
    assert complete(engine, *(prompt(*range(3, 3 + n)) for n in (1, 5, 40, 90))) == [
        expected(list(range(3, 3 + n))) for n in (1, 5, 40, 90)
    ]
