"""Tally and Exporter: what is counted is what comes out, while others count too; docs/metrics.md agrees."""

import importlib.util
import re
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import pytest

from backend import tally
from backend.errors import Cancelled, DeadlineExceeded, EngineDown
from backend.metrics import COUNTER, GAUGE, GENERATE, HISTOGRAM, REASONS, TASK
from backend.tally import FAILED, KEPT, READY, STARTING, Tally, reason_of

ROOT = Path(__file__).parents[2]


def shown(found, last=False):
    """Values by name and reason; of histograms all that is to be observed."""
    values = {}
    for metric, reason, value in found.changes(last):
        if metric.kind == HISTOGRAM:
            values.setdefault(metric.name, []).append(value)
        else:
            values[(metric.name, reason) if reason else metric.name] = value
    return values


def gauges(values):
    return {name: value for name, value in values.items() if name in {m.name for m in GENERATE if m.kind == GAUGE}}


def test_counters_give_what_they_gained_and_nothing_where_they_stand():
    found = Tally(GENERATE)
    found.prompt_tokens, found.preemptions = 7, 2
    found.ended("stop", 0.5)
    found.ended("error")
    first = shown(found)
    assert first["vllm:prompt_tokens_total"] == 7
    assert first["vllm:num_preemptions"] == first["vllm:num_preemptions_total"] == 2
    assert first["vllm:request_success", "stop"] == first["vllm:request_success_total", "error"] == 1
    found.prompt_tokens += 3
    second = shown(found)
    assert second == gauges(second) | {"vllm:prompt_tokens_total": 3}


class Slow(int):
    """A number beside which other threads run while it is added to."""

    def __add__(self, other):
        time.sleep(0.001)
        return Slow(int(self) + other)


def test_whatever_ends_in_several_threads_is_counted():
    found = Tally(TASK)
    found.finished["stop"] = Slow(0)
    threads = [threading.Thread(target=lambda: [found.ended("stop", 0.5) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.finished["stop"] == len(found.latency) == 80


def test_histograms_get_each_value_once_and_only_of_what_was_answered():
    found = Tally(TASK)
    for reason, seconds in (("stop", 0.5), ("deadline", 9.0), ("length", 0.25)):
        found.ended(reason, seconds)
    name = "vllm:e2e_request_latency_seconds"
    assert shown(found)[name] == [0.5, 0.25]
    assert name not in shown(found)


def test_what_nobody_reads_stays_bounded():
    found = Tally(TASK)
    for at in range(KEPT + 5):
        found.ended("stop", float(at))
    seen = shown(found)
    assert seen["vllm:e2e_request_latency_seconds"] == [float(at) for at in range(5, KEPT + 5)]
    assert seen["vllm:request_success", "stop"] == KEPT + 5


def test_steps_are_means_of_those_since_the_last_look():
    found = Tally(TASK)
    found.step(30, 40)
    found.step(10, 40)
    seen = shown(found)
    assert (seen["tritonspeed_batch_tokens"], seen["tritonspeed_padding_ratio"]) == (20, 0.5)
    seen = shown(found)
    assert (seen["tritonspeed_batch_tokens"], seen["tritonspeed_padding_ratio"]) == (0, 0)


def test_up_and_down():
    found = Tally(GENERATE)
    found.running, found.waiting, found.kv_usage = 3, 4, 0.5
    found.up(2, 1.5)
    seen = shown(found)
    assert (seen["tritonspeed_ranks_up"], seen["tritonspeed_load_seconds"], seen["vllm:kv_cache_usage_perc"]) == (
        2,
        1.5,
        0.5,
    )
    assert seen["tritonspeed_state"] == READY == 1
    found.down(FAILED)
    seen = shown(found)
    assert seen["tritonspeed_state"] == FAILED == 3
    assert [seen[f"vllm:num_requests_{name}"] for name in ("running", "waiting")] == [0, 0]
    assert (seen["tritonspeed_ranks_up"], seen["vllm:kv_cache_usage_perc"]) == (0, 0)


def test_the_heartbeat_is_now_until_the_model_is_gone(monkeypatch):
    monkeypatch.setattr(tally.time, "time", lambda: 1234.5)
    assert shown(Tally(TASK))["tritonspeed_heartbeat_seconds"] == 1234.5
    assert shown(Tally(TASK), last=True)["tritonspeed_heartbeat_seconds"] == 0


def test_the_heartbeat_stands_still_while_the_thread_that_serves_does(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tally.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tally.time, "time", lambda: 1000 + now[0])
    found = Tally(TASK, patience=75)

    def heartbeat():
        return shown(found)["tritonspeed_heartbeat_seconds"]

    now[0] += 500
    assert heartbeat() == 1600  # it loads, for as long as that takes
    found.up(1, 500)
    now[0] += 75
    assert heartbeat() == 1675
    now[0] += 1
    assert heartbeat() == 1675
    now[0] += 100
    assert heartbeat() == 1675
    found.turn()
    assert heartbeat() == 1776
    now[0] += 200
    found.down(STARTING)
    assert heartbeat() == 1976


def test_when_the_last_step_was_done(monkeypatch):
    monkeypatch.setattr(tally.time, "time", lambda: 1234.5)
    found = Tally(TASK)
    assert shown(found)["tritonspeed_last_step_seconds"] == 0
    found.done()
    assert shown(found)["tritonspeed_last_step_seconds"] == 1234.5


def test_reasons_of_errors():
    assert [reason_of(kind("x")) for kind in (Cancelled, DeadlineExceeded, EngineDown, ValueError)] == [
        "cancelled", "deadline", "error", "error"]  # fmt: skip


def test_every_metric_has_its_number_and_a_name_of_its_own():
    assert len({metric.name for metric in GENERATE}) == len(GENERATE)
    assert set(TASK) < set(GENERATE)
    assert set(shown(Tally(GENERATE))) == {metric.name for metric in GENERATE if metric.kind == GAUGE}
    for metric in GENERATE:
        assert (metric.kind == HISTOGRAM) == bool(metric.buckets) and list(metric.buckets) == sorted(
            set(metric.buckets)
        )


def test_the_document_has_the_same_metrics():
    """name, kind, labels and meaning of every row; nothing else."""
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `([\w:]+)` \| (\w+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    stated = {name: (kind, tasks.strip(), meaning.split(".")[0].strip()) for name, kind, tasks, meaning in rows}
    assert len(rows) == len(stated)
    assert stated == {m.name: (m.kind, "all" if m in TASK else "generate", m.meaning) for m in GENERATE}


# ---- the exporter, against as much of Triton as it uses


class Series:
    def __init__(self, family, labels, buckets=None):
        self.name, self.kind, self.labels, self.buckets = family.name, family.kind, labels, buckets
        self.value, self.observed = 0.0, []

    def increment(self, value):
        assert self.kind == COUNTER and value > 0
        self.value += value

    def set(self, value):
        assert self.kind == GAUGE
        self.value = value

    def observe(self, value):
        assert self.kind == HISTOGRAM
        self.observed.append(value)


class Family:
    COUNTER, GAUGE, HISTOGRAM = COUNTER, GAUGE, HISTOGRAM
    made: list

    def __init__(self, name, description, kind):
        assert description
        self.name, self.kind = name, kind

    def Metric(self, labels, buckets=None):
        self.made.append(Series(self, labels, buckets))
        return self.made[-1]


@pytest.fixture
def triton(monkeypatch):
    """backend.triton over a fake module; `made` are the series."""
    fake = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    spec = importlib.util.spec_from_file_location("triton_of_this_test", ROOT / "backend" / "triton.py")
    triton = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(triton)
    fake.MetricFamily = type("MetricFamily", (Family,), {"made": []})  # which the stub adds after the import
    triton.made = fake.MetricFamily.made
    monkeypatch.setattr(triton, "PUSH", 0.001)
    return triton


ARGS = {"model_name": "m", "model_version": "3"}


def test_all_that_is_counted_arrives_while_others_count(triton):
    found = Tally(GENERATE)
    exporter = triton.Exporter(ARGS, found)
    for at in range(20_000):
        found.generation_tokens += 1
        if not at % 100:
            found.ended("stop", 0.1)
    found.up(2, 1.0)
    exporter.close()
    values = {(each.name, each.labels.get("finished_reason")): each for each in triton.made}
    assert values["vllm:generation_tokens_total", None].value == 20_000
    assert values["vllm:request_success", "stop"].value == 200
    assert values["vllm:e2e_request_latency_seconds", None].observed == [0.1] * 200
    assert values["tritonspeed_ranks_up", None].value == 2
    assert values["tritonspeed_heartbeat_seconds", None].value == 0
    assert not any(thread.name == "exporter" for thread in threading.enumerate())


def test_every_series_is_there_at_once_with_the_servers_labels_alone(triton):
    triton.Exporter(ARGS, Tally(GENERATE)).close()
    assert Counter(each.name for each in triton.made) == {m.name: len(m.reasons) for m in GENERATE}
    for each in triton.made:
        reason = each.labels.pop("finished_reason", "stop")
        assert each.labels == {"model": "m", "version": "3"} and reason in REASONS
        assert bool(each.buckets) == (each.kind == HISTOGRAM)


def test_without_metrics_it_serves(triton, capsys, monkeypatch):
    monkeypatch.delattr(triton.pb_utils, "MetricFamily")
    triton.Exporter(ARGS, Tally(TASK)).close()
    assert "tritonspeed | m | no metrics: " in capsys.readouterr().out


def test_a_failed_push_is_not_the_last(triton, caplog):
    found = Tally(TASK)
    exporter = triton.Exporter(ARGS, found)
    (restarts,) = [each for each in triton.made if each.name == "tritonspeed_restarts_total"]
    broken = threading.Event()

    def breaks(value):
        broken.set()
        raise RuntimeError("Triton says no")

    restarts.increment = breaks
    found.restarts = 1
    assert broken.wait(10)
    del restarts.increment
    found.restarts = 3
    exporter.close()
    assert restarts.value == 2 and "metrics could not be pushed" in caplog.text


def test_once_forgotten_it_ends_the_service_and_writes_no_more(triton, monkeypatch):
    """A successor's series have the same name."""
    found, left = Tally(TASK), []
    monkeypatch.setattr(triton.Departure, "look", lambda self: found.restarts > 0 and not left.append(1))
    exporter = triton.Exporter(ARGS, found)
    found.restarts = 1
    exporter._thread.join(10)
    assert not exporter._thread.is_alive() and left == [1]
    (beat,) = [each for each in triton.made if each.name == "tritonspeed_heartbeat_seconds"]
    assert beat.value == 0
    exporter.close()


def test_names_that_clients_already_use():
    vllm = """prompt_tokens_total generation_tokens_total num_requests_running num_requests_waiting kv_cache_usage_perc
        prefix_cache_queries prefix_cache_hits num_preemptions time_to_first_token_seconds time_per_output_token_seconds
        e2e_request_latency_seconds request_queue_time_seconds request_success"""
    ours = "ranks_up restarts_total load_seconds batch_tokens padding_ratio"
    assert {f"vllm:{name}" for name in vllm.split()} < {m.name for m in GENERATE}
    assert {f"tritonspeed_{name}" for name in ours.split()} < {m.name for m in TASK}
