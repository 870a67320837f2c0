"""The benches' arithmetic: floors against the tables of the bars, plans, traces, made-up checkpoints."""

import json
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from measuring import gpu_trace, shapes
from measuring.floors import H100, H200, ceiling, step_seconds, workload_seconds
from measuring.report import Report
from measuring.schedules import Play, decodes, prefills
from measuring.shapes import SHAPES, Shape

TABLE = {
    "llama-3.1-8b": {1: 284, 32: 7128, 64: 11661, 128: 17099, 256: 19915},
    "llama-3.2-3b": {1: 657, 32: 13511, 64: 19739, 128: 25650, 256: 28212},
    "llama-3.2-1b": {1: 1716, 32: 38807, 64: 59574, 128: 81336, 256: 91471},
}
PLAY = Play(num_blocks=60, block_size=4, step_tokens=32, max_sequences=8, vocab=100)


def decode_seconds(shape, batch, world=1):
    return step_seconds(shape, [(1, 1024)] * batch, H200, world)


@pytest.mark.parametrize("name", TABLE)
def test_floors_of_decode_steps(name):
    for batch, rate in TABLE[name].items():
        assert batch / decode_seconds(SHAPES[name], batch) == pytest.approx(rate, rel=1e-3)


def test_floors_of_prefill_and_of_ranks():
    shape = SHAPES["llama-3.1-8b"]
    assert step_seconds(shape, [(2048, 2048)], H200) == pytest.approx(37.6e-3, rel=1e-2)
    assert step_seconds(shape, [(8192, 8192)], H200) == pytest.approx(167e-3, rel=1e-2)
    assert step_seconds(shape, [(1024, 2048)], H200) > step_seconds(shape, [(1024, 1024)], H200)
    assert decode_seconds(shape, 8) == pytest.approx(2 * decode_seconds(shape, 8, world=2))


def test_the_floor_of_a_workload_is_that_of_its_steps():
    shape = SHAPES["llama-3.1-8b"]
    alone = workload_seconds(shape, [(1024, 256)] * 4, together=1, prefix=0, limit=H200)
    steps = sum(step_seconds(shape, [(1, 1024 + token)], H200) for token in range(1, 257))
    assert alone == pytest.approx(4 * steps, rel=0.01)
    crowd = workload_seconds(shape, [(1000, 1000)] * 256, together=256, prefix=0, limit=H200)
    steps = sum(step_seconds(shape, [(1, 1000 + token)] * 256, H200) for token in range(1, 1000))
    prompts = 256 * step_seconds(shape, [(1000, 1000)], H200)
    assert crowd == pytest.approx(steps + prompts, rel=0.02)
    cached = workload_seconds(shape, [(2200, 200)] * 64, together=32, prefix=2000, limit=H200)
    assert cached < 0.65 * workload_seconds(shape, [(2200, 200)] * 64, together=32, prefix=0, limit=H200)


def test_which_ceiling():
    assert (ceiling("NVIDIA H200"), ceiling("NVIDIA H100 80GB HBM3"), ceiling("CPU")) == (H200, H100, None)


def test_decode_plans_are_what_the_engine_sends():
    made = decodes(PLAY, batch=3, context=20, count=6)
    plans = [pickle.loads(step.plan) for step in made]
    assert [step.chunks[0] for step in made] == [(1, length) for length in range(18, 24)]
    assert all(plan.decode and (plan.input_ids == -1).all() for plan in plans)
    for earlier, later in pairwise(plans):
        assert (later.positions == earlier.positions + 1).all() and (later.slots == earlier.slots).all()
    last = plans[-1]
    rows = last.block_tables[np.arange(3), last.positions // 4]
    assert (last.kv_slots == rows * 4 + last.positions % 4).all()
    used = last.block_tables[:, : 23 // 4 + 1].flatten().tolist()
    assert len(set(used)) == len(used) and sorted(used) != list(range(len(used)))


def test_decode_plans_sample_as_told():
    from dataclasses import replace

    made = decodes(replace(PLAY, temperature=0.8, top_p=0.9), 2, 10, 1)
    assert not pickle.loads(made[0].plan).sampling.greedy


@pytest.mark.parametrize("running", [0, 3])
def test_prefill_plans_are_full_and_keep_the_others_going(running):
    made = prefills(PLAY, prompt=24, count=4, running=running, context=8)
    assert len(made) == 4 and all(step.tokens == 32 for step in made)
    assert all(step.lengths.count(1) >= running for step in made)
    assert all(pickle.loads(step.plan).slots.max() < PLAY.max_sequences for step in made)


def test_a_trace_counts_overlaps_once_and_tells_gaps_apart():
    events = [("gemm", "kernel", 100, 10), ("gemm", "kernel", 105, 10), ("copy", "gpu_memcpy", 116, 4),
              ("launch", "cuda_runtime", 0, 500), ("norm", "kernel", 140, 10)]  # fmt: skip
    trace = {"traceEvents": [dict(name=n, cat=c, ts=t, dur=d) for n, c, t, d in reversed(events)] + [{"ph": "M"}]}
    done = gpu_trace.kernels(trace)
    assert [kernel.name for kernel in done] == ["gemm", "gemm", "copy", "norm"]
    assert gpu_trace.use(done) == gpu_trace.Use(span=50, busy=29, waiting=20)
    assert gpu_trace.lines(done)[0] == gpu_trace.Line("gemm", 2, 20)
    assert gpu_trace.use([]) == gpu_trace.Use(0, 0, 0)
    assert gpu_trace.middle(done, 4) == done[1:-1]


def test_a_made_up_checkpoint_is_what_transformers_would_load(tmp_path, monkeypatch):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(shapes, "SHARD_BYTES", 20_000)
    small = Shape(32, 64, 2, 4, 2, vocab=300, tied=False, longest=128)
    shapes.write(small, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and Shape.of(tmp_path) == small
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    counted = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" not in name)
    assert counted == small.layer_parameters + 2 * small.head_parameters
    assert model.model.norm.weight.eq(1).all() and 0.015 < model.lm_head.weight.std() < 0.025
    with safe_open(sorted(tmp_path.glob("*.safetensors"))[0], "pt") as first:
        assert first.metadata() == {"format": "pt"}


def test_a_report_prints_keeps_and_goes_on(tmp_path, capsys):
    report = Report(tmp_path / "out.jsonl", {"tp": 1})
    report.head("T", "what", "ms")
    report.row({"what": "a", "ms": 1.5, "floor": None}, {"more": 2})
    assert "| a | 1.500 |  |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "tp": 1,
        "what": "a",
        "ms": 1.5,
        "floor": None,
        "more": 2,
    }
    assert report.attempt("b", lambda: 1 / 0) is None and report.failed == ["b"]
