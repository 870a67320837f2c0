"""Metrics as a real server gives them: names, kinds, known loads, dead ranks and stubs, reloads; dashboard, alerts."""

import json
import re
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from guests import guest
from serving import answers, eventually, failure, request

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))
import tiny_encoders

from backend import repository
from backend.metrics import GENERATE, TASK

pytestmark = pytest.mark.server

DEPLOY = Path(__file__).parents[2] / "deploy"
SOON = 10
"""Seconds for a push to arrive."""


@pytest.fixture(scope="module")
def counted(served, tiny):
    """A generate model on two ranks that nobody else asks."""
    with guest(served, "generate", "counted", tiny, tensor_parallel=2, max_model_len=256) as name:
        yield name


@pytest.fixture(scope="module")
def classed(served, tmp_path_factory):
    """A task of one answer, likewise."""
    with guest(served, "classify", "classed", tiny_encoders.write(tmp_path_factory.mktemp("classed"))) as name:
        yield name


def exposed(served):
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics", timeout=10) as answer:
        return answer.read().decode()


def values(served, model):
    """A model's numbers by name, with `finished_reason` where there is one: `name/reason`; no buckets."""
    found = {}
    for name, labels, value in re.findall(r"^([\w:]+)\{([^}]*)\} (\S+)$", exposed(served), re.M):
        given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if given.get("model") == model and "le" not in given:
            reason = given.get("finished_reason")
            found[f"{name}/{reason}" if reason else name] = float(value)
    return found


@contextmanager
def gains(served, model, **expected):
    """What the block adds to counters, by names with __ for : and / where a label follows."""
    wanted = {name.replace("__", ":", 1).replace("__", "/"): gain for name, gain in expected.items()}
    before = values(served, model)
    yield
    gained = {}

    def arrived():
        now = values(served, model)
        gained.update({name: now[name] - before[name] for name in wanted})
        return gained == wanted or None

    try:
        eventually(arrived, SOON)
    except AssertionError:
        assert gained == wanted


def test_every_name_of_every_model_is_there_with_its_kind(served, counted, classed):
    text = exposed(served)
    kinds = dict(re.findall(r"^# TYPE ([\w:]+) (\w+)$", text, re.M))
    assert {metric.name: kinds.get(metric.name) for metric in GENERATE} == {m.name: m.kind for m in GENERATE}
    for model, metrics in ((counted, GENERATE), (classed, TASK)):
        lines = re.findall(rf'^([\w:]+)\{{.*model="{model}".*\}} ', text, re.M)
        ours = Counter(re.sub(r"(_seconds)_(bucket|sum|count)$", r"\1", line) for line in lines)
        expected = {m.name: len(m.reasons) if not m.buckets else len(m.buckets) + 3 for m in metrics}
        assert {name: count for name, count in ours.items() if not name.startswith("nv_")} == expected


def test_a_known_load_of_generate(served, counted):
    with served.pipeline(counted) as pipe:
        with gains(served, counted, vllm__generation_tokens_total=1):
            length = pipe("the quick", max_tokens=1).num_input_tokens
        with gains(
            served, counted,
            vllm__prompt_tokens_total=5 * length, vllm__generation_tokens_total=4 * 7 + 1,
            vllm__request_success__length=5, vllm__request_success_total__length=5, vllm__request_success__error=0,
            vllm__e2e_request_latency_seconds_count=5, vllm__time_to_first_token_seconds_count=5,
            vllm__request_queue_time_seconds_count=5, vllm__time_per_output_token_seconds_count=4,
            vllm__prefix_cache_queries=5 * length, tritonspeed_restarts_total=0,
        ):  # fmt: skip
            for n in (1, 3):
                pipe("the quick", max_tokens=7, n=n, ignore_eos=True)
            pipe("the quick", max_tokens=1)
    assert values(served, counted)["tritonspeed_state"] == 1
    assert eventually(lambda: time.time() - 60 < values(served, counted)["tritonspeed_last_step_seconds"], SOON)


def test_what_ends_otherwise(served, counted):
    with gains(served, counted, vllm__request_success__deadline=1, vllm__e2e_request_latency_seconds_count=0):
        late = request(counted, "the", {"timeout": 1}, max_tokens=200, ignore_eos=True)
        assert failure(served.ask(late)).startswith("DeadlineExceeded")
    with gains(served, counted, vllm__request_success__cancelled=1, vllm__time_to_first_token_seconds_count=1):
        call = served.ask(request(counted, "the", stream=True, max_tokens=250, ignore_eos=True))
        next(call)
        call.cancel()


def test_gauges_rise_and_fall_with_the_load(served, counted):
    call = served.ask(request("single", "the", stream=True, max_tokens=7000, ignore_eos=True))
    next(call)
    second = served.ask(request("single", "the", stream=True, max_tokens=2))
    busy = {"vllm:num_requests_running": 1, "vllm:num_requests_waiting": 1}
    assert eventually(lambda: busy.items() <= values(served, "single").items(), SOON)
    assert eventually(lambda: values(served, "single")["vllm:kv_cache_usage_perc"] > 0, SOON)
    assert eventually(lambda: values(served, "single")["tritonspeed_batch_tokens"] > 0, SOON)
    call.cancel()
    assert answers(second)
    idle = dict.fromkeys([*busy, "tritonspeed_batch_tokens"], 0)
    assert eventually(lambda: idle.items() <= values(served, "single").items(), SOON)


def test_refused_requests_are_counted(served):
    """single runs one, and lets two wait."""
    with gains(served, "single", tritonspeed_refused_total=1):
        calls = [served.ask(request("single", "the", stream=True, max_tokens=7000, ignore_eos=True)) for _ in range(3)]
        eventually(lambda: values(served, "single")["vllm:num_requests_waiting"] == 2, SOON)
        assert failure(served.ask(request("single", "the"))).startswith("Overloaded")
        for call in calls:
            call.cancel()


def test_a_known_load_of_a_task(served, classed):
    texts = ["the quick brown fox", "good", "Anna Smith of Berlin"]
    with (
        served.of("classify", classed) as pipe,
        gains(
            served,
            classed,
            vllm__request_success__stop=3,
            vllm__request_success__error=1,
            vllm__e2e_request_latency_seconds_count=3,
        ),  # fmt: skip
    ):
        for text in texts:
            pipe(text)
        with pytest.raises(Exception, match="top_k"):
            pipe("good", top_k=-5)


@pytest.mark.parametrize("task", ["counted", "classed"])
def test_a_killed_rank_counts_as_a_restart_and_counters_go_on(served, task, request):
    """Of both kinds of tasks."""
    model = request.getfixturevalue(task)
    before = values(served, model)
    ranks = served.family(model)[1]
    with gains(served, model, tritonspeed_restarts_total=1):
        ranks[0].kill()
        eventually(
            lambda: values(served, model)["tritonspeed_restarts_total"] > before["tritonspeed_restarts_total"], 60
        )
    assert eventually(lambda: values(served, model)["tritonspeed_ranks_up"] == len(ranks), 90)
    after = values(served, model)
    assert after["vllm:request_success/error"] == before["vllm:request_success/error"]
    assert all(after[m.name] >= before[m.name] for m in TASK if m.kind == "counter" and m.reasons == ("",))
    assert after["tritonspeed_load_seconds"] > 0


def test_a_reload_and_what_is_unloaded(served, tiny):
    """A new process writes on where the old one ended; an unloaded model's heartbeat is 0 and nothing of it is up."""
    with guest(served, "generate", "reloaded", tiny, max_model_len=64) as name, served.pipeline(name) as pipe:
        pipe("the", max_tokens=3, ignore_eos=True)
        eventually(lambda: values(served, name)["vllm:generation_tokens_total"] == 3, SOON)
        old = served.family(name)[0]
        repository.write(served.repository, "generate", name, {"model": str(tiny), "max_model_len": "128"})
        with served.control() as control:
            control.load(name, 120)
        eventually(lambda: served.family(name) not in (None, (old, [])) and served.family(name)[0] != old)
        pipe("the", max_tokens=2, ignore_eos=True)
        both = {"vllm:generation_tokens_total": 5, "tritonspeed_ranks_up": 1}
        assert eventually(lambda: both.items() <= values(served, name).items(), SOON)
        assert values(served, name)["tritonspeed_heartbeat_seconds"] > 0
    gone = {"vllm:generation_tokens_total": 5}
    gone |= {f"tritonspeed_{name}": 0 for name in ("ranks_up", "state", "heartbeat_seconds")}
    assert eventually(lambda: gone.items() <= values(served, name).items(), SOON)


def test_a_dead_stubs_heartbeat_stands_still(served, tiny, counted):
    """Everything else of it stays as it was too: so rules ask for the heartbeat's age."""
    with guest(served, "generate", "stopped", tiny) as name:
        stub, _ = served.family(name)
        stub.kill()
        eventually(lambda: served.family(name) is None, SOON)
        last, other = values(served, name), values(served, counted)["tritonspeed_heartbeat_seconds"]
        eventually(lambda: values(served, counted)["tritonspeed_heartbeat_seconds"] > other + 2, SOON)
        assert values(served, name) == last and last["tritonspeed_ranks_up"] == 1


# ---- what is deployed


def expressions():
    """Every `expr` of the dashboard and of the alerts, with where it stands."""
    dashboard = json.loads((DEPLOY / "grafana" / "tritonspeed.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    for rule in alerts["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


def test_dashboard_and_alerts_ask_for_what_is_served(served, counted):
    there = set(re.findall(r"^([\w:]+)\{", exposed(served), re.M))
    asked = [(where, set(re.findall(r"\b(?:vllm:|tritonspeed_|nv_)\w+", each))) for where, each in expressions()]
    assert len(asked) > 25 and all(names for _, names in asked)
    assert [(where, names - there) for where, names in asked if names - there] == []
    shown = {re.sub("_(total|bucket|sum|count)$", "", name) for _, names in asked for name in names}
    assert {re.sub("_total$", "", metric.name) for metric in GENERATE} - shown == set()


def test_expressions_are_balanced_and_labels_are_ours():
    for where, each in expressions():
        assert all(each.count(a) == each.count(b) for a, b in ("()", "{}", "[]")), where
        assert set(re.findall(r"(\w+)=~?\"", each)) <= {"model", "finished_reason"}, where
