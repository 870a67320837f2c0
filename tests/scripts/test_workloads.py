"""The benches' load: lengths and arrivals of workloads, closed loops, what figures say of traces, who is asked how."""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from measuring import comparison, witness
from measuring.contenders import Engine
from measuring.figures import Targets, Trace, figures, percentile
from measuring.remote import Remote
from measuring.stream_client import play
from measuring.workloads import NAMED, Lengths, Request, Sizes, Workload, named, streams

from backend.errors import DeadlineExceeded, Overloaded, ServingError
from client import errors

NAMES = {
    "W1": ["W1 2600/60, 4 clients", "W1 1200/128, 4 clients"],
    "W3": ["W3 128/128", "W3 1000/1000", "W3 2048/128", "W3 2048/2048"],
    "W4": ["W4"],
    "W5": ["W5 4/s", "W5 8/s", "W5 16/s", "W5 32/s", "W5 at once"],
    "W8": ["W8 1024/256"],
}


def mean(values):
    return statistics.fmean(values)


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert [each.name for each in named([name], Sizes(clients=(4,)))] == NAMES[name]


def test_a_part_of_a_workload():
    (only,) = named(["W3:1000/1000"], Sizes(requests=3))
    assert only.lengths == (Lengths(1000, 1000),) * 3 and only.output == 3000 and only.longest == 2000
    paced = named(["W1:1200"], Sizes(requests=2000, rates=(8, 16)))
    assert [each.name for each in paced] == ["W1 1200/128 8/s", "W1 1200/128 16/s"]
    assert [round(2000 / each.lengths[-1].at) for each in paced] == [8, 16]
    pair = named(["W3:1000/1000*5", "W8"], Sizes(requests=3))
    assert [len(each.lengths) for each in pair] == [5, 3]


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [("W1:2600", 2600, 60), ("W1:1200", 1200, 128), ("W4", 562, 562), ("W5:once", 202, 179)],
)
def test_lengths_have_their_means_and_never_change(name, prompt, output):
    (one,), (again,) = (named([name], Sizes(requests=2000, clients=(8,))) for _ in range(2))
    assert one == again
    assert mean(each.prompt for each in one.lengths) == pytest.approx(prompt, rel=0.05)
    assert mean(each.output for each in one.lengths) == pytest.approx(output, rel=0.05)
    assert min(each.prompt for each in one.lengths) > 0 and len(set(one.lengths)) > 1000


def test_arrivals_come_at_their_rate():
    for each in named(["W5"], Sizes(requests=2000, rates=(4, 32))):
        times = [length.at for length in each.lengths]
        assert times == sorted(times)
        if "once" not in each.name:
            assert 2000 / times[-1] == pytest.approx(4 if " 4/s" in each.name else 32, rel=0.1)


def test_few_clients_send_fewer_requests():
    assert [len(each.lengths) for each in named(["W7"], Sizes())] == [128]
    sizes = [(each.clients, len(each.lengths)) for each in named(["W2:2600"], Sizes(clients=(1, 64)))]
    assert sizes == [(1, 16), (64, 512)]


def test_a_shared_prefix_and_new_ids():
    (one,) = named(["W7"], Sizes(requests=3))
    chance = random.Random(0)
    first, second = one.requests(chance), one.requests(chance)
    assert all(each.ids[:2000] == first[0].ids[:2000] and len(each.ids) == 2200 for each in first)
    assert first[0].ids[2000:] != first[1].ids[2000:] and first[0].ids != second[0].ids
    assert set(NAMED) == {"W1", "W2", "W3", "W4", "W5", "W7", "W8"}


def test_figures_of_two_requests():
    quick = Trace(0.0, [(0.5, 1), (0.7, 2), (0.9, 1)])
    late = Trace(1.0, [(3.0, 1), (4.0, 1)])
    found = figures([quick, late], prompts=[512, 512], outputs=[4, 2])
    assert found["tok/s"] == 6 / 4 and found["req/s"] == 2 / 4 and found["met/s"] == 1 / 4
    assert found["ttft p50"] == pytest.approx(1250) and found["ttft p99"] == pytest.approx(500)
    assert found["tpot"] == pytest.approx(1e3 * mean([0.4 / 3, 1.0]))
    assert quick.gaps == pytest.approx([0.2, 0.2, 0.0]) and found["itl p50"] == pytest.approx(200)


def test_figures_refuse_a_request_that_lacks_tokens():
    with pytest.raises(ValueError, match="gave 2 tokens instead of 3"):
        figures([Trace(0.0, [(1.0, 2)])], [1], [3])


REFUSED = "Overloaded('later')"


def test_figures_count_refusals_where_there_are_targets():
    late = Trace(0.0, [(0.1, 3)], "DeadlineExceeded('late')")  # what it gave before is worth nothing
    good = Trace(0.0, [(0.5, 1), (2.0, 3)])
    traces, prompts, outputs = [Trace(refused=REFUSED), good, late, good], [512] * 4, [9, 4, 9, 4]
    found = figures(traces, prompts, outputs, Targets(1.0, 1.0))
    assert (found["within"], found["refused"]) == (0.5, 0.5)
    assert (found["tok/s"], found["req/s"], found["met/s"]) == (4, 1, 0)
    assert (found["ttft p50"], found["tpot"], found["itl p99"]) == (500, 500, 1500)
    with pytest.raises(ValueError, match=r"2 of 4 requests were refused, .*: Overloaded\('later'\)"):
        figures(traces, prompts, outputs)


def test_figures_of_refusals_alone():
    found = figures([Trace(refused=REFUSED)] * 2, [5, 5], [5, 5], Targets(1.0, 1.0))
    assert found == {"within": 0, "refused": 1, "tok/s": 0, "req/s": 0, "met/s": 0}


def test_a_request_that_gave_nothing_without_an_error_is_no_refusal():
    with pytest.raises(ValueError, match="gave 0 tokens instead of 3"):
        figures([Trace()], [1], [3], Targets(1.0, 1.0))


def test_met_needs_both_speeds():
    assert Trace(1.0, [(2.0, 1), (3.0, 4)]).met(512)
    assert not Trace(1.0, [(2.1, 1), (3.0, 4)]).met(512)
    assert not Trace(1.0, [(2.0, 1), (3.1, 4)]).met(512)


def test_percentiles():
    assert [percentile(range(101), share) for share in (0, 0.5, 0.99, 1)] == [0, 50, 99, 100]
    assert percentile([], 0.5) == 0.0


class Crowd:
    """Notes how many are asked at a time."""

    def __init__(self):
        self.now, self.most, self.lock = 0, 0, threading.Lock()

    def ask(self, request):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        yield 1
        time.sleep(0.02)
        yield request.output - 1
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize(("clients", "most"), [(1, 1), (3, 3), (0, 8)])
def test_streams_of_so_many_clients(clients, most):
    crowd = Crowd()
    requests = [Request([1], 2 + number) for number in range(8)]
    traces = play(crowd.ask, time.perf_counter() + 0.05, clients, requests)
    assert [trace.tokens for trace in traces] == [request.output for request in requests]
    assert crowd.most <= most and (clients != 1 or traces[1].start > traces[0].end)
    assert clients or all(trace.start == 0.0 for trace in traces)


@pytest.mark.parametrize("error", [errors.Overloaded, errors.DeadlineExceeded])
def test_a_stream_that_is_refused_says_so_and_the_others_go_on(error):
    crowd = Crowd()

    def ask(request):
        if request.output == 3:
            raise error("later")
        return crowd.ask(request)

    traces = play(ask, time.perf_counter(), 1, [Request([1], output) for output in (2, 3, 4)])
    assert [trace.tokens for trace in traces] == [2, 0, 4]
    assert [trace.refused for trace in traces] == ["", f"{error.__name__}('later')", ""]


def test_other_errors_of_streams_are_raised():
    def ask(request):
        raise errors.ServerError("a bug")

    with pytest.raises(errors.ServerError, match="a bug"):
        play(ask, time.perf_counter(), 0, [Request([1], 1)])


def test_streams_wait_for_their_time():
    traces = play(Crowd().ask, time.perf_counter(), 0, [Request([1], 2, at) for at in (0.0, 0.2)])
    assert traces[1].start == 0.2 and traces[1].arrivals[0][0] >= 0.2


class Immediate:
    """An engine that has every token at once, and rings twice."""

    def __init__(self):
        self.open_now = self.most = 0

    def open(self, prompts, notify):
        self.open_now += 1
        self.most = max(self.most, self.open_now)
        assert isinstance(prompts[0].token_ids, array)
        deltas = [SimpleNamespace(token_ids=[7] * prompts[0].params.max_tokens)]
        stream = SimpleNamespace(take=lambda: deltas, done=True)
        notify(False)
        notify(True)
        return stream

    def leave(self, stream):
        self.open_now -= 1


@pytest.mark.parametrize(("clients", "most"), [(2, 2), (0, 5)])
def test_the_engine_is_asked_by_so_many_clients(clients, most):
    served = Engine.__new__(Engine)
    served._engine = Immediate()
    requests = [Request([1, 2], number + 1) for number in range(5)]
    traces = served.run(requests, clients)
    assert [trace.tokens for trace in traces] == [1, 2, 3, 4, 5]
    assert (served._engine.most, served._engine.open_now) == (most, 0)


class Refusing(Immediate):
    """Of requests that want more than two tokens it takes none, or all and ends them with `late`."""

    def __init__(self, late=None):
        super().__init__()
        self.late = late

    def open(self, prompts, notify):
        if prompts[0].params.max_tokens <= 2:
            return super().open(prompts, notify)
        if self.late is None:
            raise Overloaded("later")
        self.open_now += 1
        notify(True)
        return SimpleNamespace(take=self.fail, done=False)

    def fail(self):
        raise self.late


@pytest.mark.parametrize("clients", [0, 1])
@pytest.mark.parametrize("late", [None, Overloaded("later"), DeadlineExceeded("later")])
def test_the_engine_may_refuse(clients, late):
    """The last one as well: nothing is open then."""
    served = Engine.__new__(Engine)
    served._engine = Refusing(late)
    traces = served.run([Request([1], output) for output in (1, 3, 2, 3)], clients)
    said = repr(late or Overloaded("later"))
    assert [(trace.tokens, trace.refused) for trace in traces] == [(1, ""), (0, said), (2, ""), (0, said)]
    assert served._engine.open_now == 0


def test_other_errors_of_the_engine_are_raised():
    served = Engine.__new__(Engine)
    served._engine = Refusing(ServingError("a bug"))
    with pytest.raises(ServingError, match="a bug"):
        served.run([Request([1], 3)], 0)


def test_a_process_answers_and_says_what_fails():
    remote = Remote("measuring.stream_client", "1")
    try:
        assert remote.receive() is None  # nobody listens on that port, which shows with the first request
        with pytest.raises(RuntimeError, match=r"measuring.stream_client: \w+"):
            remote.ask((time.perf_counter(), 1, [Request([1], 1)]))
        with pytest.raises(RuntimeError, match="TypeError"):
            remote.ask(())
    finally:
        remote.close()


class Contender:
    def __init__(self, rate):
        self.rate, self.closed = rate, False

    def run(self, requests, clients):
        return [Trace(0.0, [(0.1, 1), (request.output / self.rate, request.output - 1)]) for request in requests]

    def close(self):
        self.closed = True


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_comparison_prints_medians_and_ratios(in_turn, monkeypatch, tmp_path, capsys):
    contenders = {"engine": Contender(40), "continuous": Contender(10)}
    alone = []
    monkeypatch.setattr(comparison, "made", lambda name, options, alone: seen(name, alone))

    def seen(name, one):
        alone.append(one)
        return contenders[name]

    options = argparse.Namespace(
        contenders="engine,continuous,vllm", in_turn=in_turn, rounds=2, json=tmp_path / "out.jsonl", witness=False,
        model="somewhere/smol", shape=None, dtype="auto", tensor_parallel=1, set=[], slo=None,
    )  # fmt: skip
    comparison.Comparison(options, streams([2], prompt=400, output=20)).run()
    said = capsys.readouterr().out
    assert "vllm: not measured" in said
    assert "| 2 streams 400/20 | engine | 80.0 | 4.0 | 4.0 | 100.0 | 100.0 |" in said and said.count("| 4.00 |") == 1
    assert alone == [in_turn, in_turn] and all(each.closed for each in contenders.values())
    lines = [json.loads(line) for line in options.json.read_text().splitlines()]
    assert len(lines) == 4 and {line["contender"] for line in lines} == set(contenders)


def test_a_comparison_knows_the_share_of_the_floor(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256}
    ))  # fmt: skip
    monkeypatch.setattr(comparison, "device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(comparison, "made", lambda name, options, alone: Contender(142))
    options = argparse.Namespace(
        contenders="engine", in_turn=False, rounds=1, json=None, witness=False, model=str(tmp_path), shape=None,
        dtype="auto", tensor_parallel=1, set=[], slo=None,
    )  # fmt: skip
    comparison.Comparison(options, streams([1], prompt=64, output=2000)).run()
    said = capsys.readouterr().out
    assert "itl p99 ms | of floor |" in said and "| 0.50 |" in said  # 142 of 284 tok/s, contexts of 1,064 at the mean


def test_another_contender_has_other_parameters():
    options = argparse.Namespace(model="m", tensor_parallel=2, dtype="auto", set=["block_size=32"])
    assert comparison.parameters(options, alone=True)["block_size"] == "32"
    assert comparison.parameters(options, alone=False)["kv_cache_fraction"] == comparison.SHARED
    with pytest.raises(SystemExit, match="no contender 'other'"):
        comparison.made("other:a=b", options, alone=True)


def test_what_perf_analyzer_is_given_and_says():
    workload = Workload("one", (Lengths(3, 5),) * 100)
    data = witness.inputs(workload)["data"]
    assert len(data) == witness.MOST and data[0]["input_ids"]["shape"] == [3] and data[0]["max_tokens"] == [5]
    text = "Concurrency,Inferences/Second,Response Throughput,p50 latency,p99 latency\n4,10,50,2000,3000\n"
    found = witness.figures(text, workload)
    assert found == {"tok/s": 50, "req/s": 10, "responses/s": 50, "p50": 2, "p99": 3}


def test_goodput_is_the_share_within_both_targets():
    def trace(first, later):
        return Trace(0.0, [(first, 1), (first + 10 * later, 10)])

    targets = Targets.of("500/30")
    assert targets == (0.5, 0.03)
    traces = [trace(0.4, 0.02), trace(0.6, 0.02), trace(0.4, 0.04), trace(0.1, 0.01)]
    assert figures(traces, [5] * 4, [11] * 4, targets)["within"] == 0.5
    assert "within" not in figures(traces, [5] * 4, [11] * 4)


def test_a_comparison_shows_goodput_where_targets_are_given(monkeypatch, capsys):
    monkeypatch.setattr(comparison, "made", lambda name, options, alone: Contender(40))
    options = argparse.Namespace(
        contenders="engine", in_turn=False, rounds=1, json=None, witness=False, model="m", shape=None, dtype="auto",
        tensor_parallel=1, set=["device=cpu"], slo=Targets.of("100/30"),
    )  # fmt: skip
    comparison.Comparison(options, streams([2, 3], prompt=40, output=20)).run()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0].endswith("| itl p99 ms | within | refused |")
    assert [row[-16:] for row in rows[2:]] == [" | 1.00 | 0.00 |"] * 2


class Full(Contender):
    """Refuses the first so many requests of a round."""

    def __init__(self, refuses):
        super().__init__(40)
        self.refuses = refuses

    def run(self, requests, clients):
        return [Trace(refused=REFUSED)] * self.refuses + super().run(requests[self.refuses :], clients)


def test_a_comparison_shows_refusals_where_targets_are_given_and_fails_without(monkeypatch, capsys):
    contenders = {"server": Full(1), "engine": Full(4)}
    monkeypatch.setattr(comparison, "made", lambda name, options, alone: contenders[name])
    monkeypatch.setattr(comparison, "_warming", lambda workload: workload)
    options = argparse.Namespace(
        contenders="server,engine", in_turn=False, rounds=2, json=None, witness=False, model="m", shape=None,
        dtype="auto", tensor_parallel=1, set=["device=cpu"], slo=Targets.of("100/30"),
    )  # fmt: skip
    comparison.Comparison(options, streams([4], prompt=40, output=20)).run()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 streams")]
    assert rows[0].startswith("| 4 streams 40/20 | server | 120.0 | 6.0 |") and rows[0].endswith("| 0.75 | 0.25 |")
    assert rows[1] == "| 4 streams 40/20 | engine | 0.0 | 0.0 | 0.0 |  |  |  |  |  | 0.00 | 1.00 |"
    options.slo = None
    with pytest.raises(ValueError, match="1 of 4 requests were refused"):
        comparison.Comparison(options, streams([4], prompt=40, output=20)).run()
