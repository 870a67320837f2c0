"""One rank fails while another waits for it in an all-reduce; deadlines in prefill. docs/faults.md, 1, 6 and 13."""

import sys
import time
from array import array
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from backend.config import EngineConfig
from backend.errors import EngineDown
from backend.generation.blocks import BlockPool
from backend.generation.engine import Engine
from backend.generation.prompt import Prompt
from backend.generation.scheduler import Scheduler
from backend.generation.sequence import SamplingParams, Sequence

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))
from processes import ranks  # noqa: E402
from tiny import save_llama  # noqa: E402

RAISES, DIES = 290, 291  # of failing_decoder, which imports torch
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Two ranks; a step may take ten minutes, so that only a rank's own word or death can end it in time."""
    folder = save_llama(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(FAKES))
        environment.setenv("TRITONSPEED_PYTHON", sys.executable)
        config = EngineConfig(
            model=str(folder), device="cpu", threads=1, tensor_parallel=2, max_sequences=4, step_timeout=600.0,
            restart_backoff=0.05,
        )  # fmt: skip
        engine = Engine(config, lambda line: None, "failing_decoder:FailingDecoder")
        engine.start()
        yield engine
        engine.close()


def tokens(engine, *ids):
    prompt = Prompt(array("i", ids), GREEDY)
    return [token for deltas in engine.run([prompt], timeout=60) for delta in deltas for token in delta.token_ids]


def test_ranks_reach_each_other_over_loopback_alone(engine):
    """docs/faults.md, 26."""
    assert tokens(engine, 5, 6, 7)
    found = [each for pid in ranks() for each in psutil.Process(pid).net_connections("inet")]
    addresses = [at.ip for each in found for at in (each.laddr, each.raddr) if at]
    assert addresses and [ip for ip in addresses if not ip_address(ip.removeprefix("::ffff:")).is_loopback] == []


@pytest.mark.parametrize(
    ("token", "reason"),
    [(RAISES, "rank 1: ValueError at fakes/failing_decoder.py:"), (DIES, "rank 1 was killed by SIGKILL")],
)
def test_one_rank_fails_and_the_other_waits_in_an_all_reduce(engine, token, reason):
    before, pids = tokens(engine, 5, 6, 7), ranks()
    with pytest.raises(EngineDown, match=reason):
        tokens(engine, 5, token)
    deadline = time.monotonic() + 120
    while not engine.healthy and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tokens(engine, 5, 6, 7) == before
    assert len(pids) == 2 and not any(map(psutil.pid_exists, pids))


def test_a_deadline_in_prefill_frees_what_is_computed_and_computes_no_more():
    pool = BlockPool(20, 16)
    scheduler = Scheduler(pool, 4, 32)
    late = Sequence(array("i", [5] * 200), SamplingParams(max_tokens=5), deadline=10.0)
    other = Sequence(array("i", [6] * 40), SamplingParams(max_tokens=5))
    scheduler.add(late)
    scheduler.add(other)
    first = scheduler.schedule()
    assert [(chunk.seq, chunk.length, chunk.samples) for chunk in first] == [(late, 32, False)]
    assert scheduler.expire(9.9) == [] and scheduler.expire(10.0) == [late]
    assert late.finish_reason == "deadline" and not late.blocks
    second = scheduler.schedule()
    assert [chunk.seq for chunk in second] == [other]
    assert scheduler.commit(first, []) == []
    scheduler.check()
