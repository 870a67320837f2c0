"""bench_steps as a whole on the CPU, and transformers as its users run it, with tiny shapes."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from measuring import peers, shapes, start, step_report, step_worker
from measuring.shapes import Shape
from measuring.workloads import Request

SMALL = Shape(32, 64, 2, 4, 2, vocab=300, tied=True, longest=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("shape")
    shapes.write(SMALL, made)
    return made


def test_every_part_runs_without_a_gpu(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_worker, "ROUNDS", 1)
    monkeypatch.setattr(start, "BESIDE", 2)
    monkeypatch.setattr(step_report, "BESIDE", 2)
    options = argparse.Namespace(
        shape=None, model=str(folder), parts="ceilings,attention,packed,prefill,decode,sampled", batches="3",
        context=24, steps=4, prompt=32, profile="3", quantization="none,int8", group=32, sweep=False,
        tensor_parallel=1, device="cpu", dtype="auto",
        set=["threads=1", "step_tokens=64", "max_model_len=128", "num_blocks=600"], json=tmp_path / "out.jsonl",
    )  # fmt: skip
    step_report.run(options)
    said = capsys.readouterr().out
    assert "no GPU" in said and "start-up: load" in said and "FAILED" not in said
    lines = [json.loads(line) for line in options.json.read_text().splitlines()]
    assert [line["what"] for line in lines] == [
        "prefill", "prefill beside 2", "decode 3", "sampled 3"
    ] * 2  # fmt: skip
    assert [line["quantization"] for line in lines] == [""] * 4 + ["int8"] * 4
    assert all(line["tok/s"] > 0 and line["floor ms"] is None for line in lines)


@pytest.fixture(params=["generate", "continuous"])
def peer(request, folder):
    model = peers.loaded(str(folder), "cpu", "float32")
    if request.param == "generate":
        yield partial(peers.generate, model)
    else:
        manager = peers.Continuous(model, 0.05)
        yield manager.run
        manager.close()


@pytest.mark.filterwarnings("default")  # transformers' own
def test_transformers_gives_every_token_a_time(peer):
    requests = [Request([5, 6, 7], 3), Request([8], 1), Request([9, 10], 4)]
    for clients in (0, 2):
        traces = peer(requests, clients)
        assert [trace.tokens for trace in traces] == [3, 1, 4]
        assert all(trace.first > 0 and trace.end >= trace.arrivals[0][0] for trace in traces)
    assert traces[2].start >= min(traces[0].end, traces[1].end)  # the third came when a client was free
