"""Encoder, a rank's worker, in this process: each sequence's answer is what the model makes of it alone."""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from tiny_encoders import write

from backend.compute.encoders.attention import Spread
from backend.compute.encoders.encoder import Encoder
from backend.config import EngineConfig
from backend.errors import LoadError
from backend.ranks.rank import Birth
from backend.tasks import TASKS
from backend.tasks.text import Piece, Ready, Texts, TextTask


class Whole(TextTask):
    """The model's vectors as they are."""

    auto = "AutoModel"

    @staticmethod
    def forward(output, batch, mask):
        return output.last_hidden_state.float()


@pytest.fixture
def encoder(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS, "whole", "whole_task:Whole")
    monkeypatch.setitem(sys.modules, "whole_task", sys.modules[__name__])

    def make(folder, said=None, **settings):
        scratch = tmp_path / "ranks"
        scratch.mkdir(exist_ok=True)
        config = EngineConfig(model=str(folder), device="cpu", threads=1, **({"step_tokens": 64} | settings))
        birth = Birth("", config, 0, 1, str(scratch), os.getpid(), "whole")
        return Encoder(birth, (said if said is not None else []).append)

    yield make
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pieces(kinds):
    rng = np.random.default_rng(4)
    lengths = [1, 7, 3, 20]
    return [
        Piece(rng.integers(5, 60, length).astype(np.int32), rng.integers(0, kinds, length).astype(np.int32))
        for length in lengths
    ]


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("bert", 2), ("roberta", 1), ("distilbert", 0), ("electra", 2), ("deberta-v2", 0), ("modernbert", 0)],
)
def test_sequences_of_a_micro_batch_do_not_see_each_other(encoder, tmp_path, family, kinds):
    folder = write(tmp_path / "model", family, "AutoModel")
    worker = encoder(folder)
    assert worker.warm_up() == Ready()  # on CPU texts are padded
    model = transformers.AutoModel.from_pretrained(folder).eval()
    given = pieces(max(kinds, 2))  # roberta's tokenizers may tell two kinds apart, of which it knows one
    answers = worker.forward(Texts.of(given))
    assert len(answers) == len(given)
    for piece, answer in zip(given, answers, strict=True):
        types = torch.from_numpy(np.minimum(piece.type_ids, max(kinds - 1, 0))).long()[None]
        more = {"token_type_ids": types} if kinds else {}
        with torch.inference_mode():
            alone = model(input_ids=torch.from_numpy(piece.ids).long()[None], **more).last_hidden_state[0]
        np.testing.assert_allclose(answer[: len(piece.ids)], alone, atol=1e-5)


@pytest.fixture
def packs(monkeypatch):
    """Packing and graphs as on CUDA; what stands for capturing returns what stands for the replay."""

    def allow(capture):
        monkeypatch.setattr(Encoder, "_packs", lambda self, dtype: True)
        monkeypatch.setattr("backend.compute.encoders.encoder.Capture", lambda: capture)

    return allow


def answers(worker):
    return [answer[: len(piece.ids)] for answer, piece in zip(worker.forward(Texts.of(GIVEN)), GIVEN, strict=True)]


GIVEN = pieces(2)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_graphs_change_no_answer(encoder, packs, tmp_path, family):
    folder = write(tmp_path / "model", family, "AutoModel")
    wanted, captured, said = answers(encoder(folder)), [], []
    packs(lambda compute: captured.append(compute) or compute)
    worker = encoder(folder, said, step_tokens=512)
    assert said == ["texts are packed without padding", "layers run as CUDA graphs"]
    ready = worker.warm_up()
    assert ready.packed and ready.graphed == 512 and 0 < ready.proof < 1e-4
    assert said[-1].startswith("output proof: within ")
    warm = len(captured)
    assert warm > 1
    for _ in range(3):
        for answer, alone in zip(answers(worker), wanted, strict=True):
            np.testing.assert_allclose(answer, alone, atol=1e-5)
    worker.warm_up()
    assert len(captured) <= warm + 1  # of the batch above; what had been warmed up was there


def no_news(compute):
    """A graph that takes in nothing of a new batch."""
    return lambda: None


def no_capture(compute):
    raise RuntimeError("operation not permitted")


@pytest.mark.parametrize(("capture", "reason"), [(no_news, "differs by"), (no_capture, "not permitted")])
def test_graphs_that_fail_their_trial_are_not_used(encoder, packs, tmp_path, capture, reason):
    folder = write(tmp_path / "model", "bert", "AutoModel")
    wanted, said = answers(encoder(folder)), []
    packs(capture)
    worker = encoder(folder, said)
    assert "without CUDA graphs" in said[-1] and reason in said[-1]
    for _ in range(3):
        for answer, alone in zip(answers(worker), wanted, strict=True):
            np.testing.assert_allclose(answer, alone, atol=1e-5)


def test_graphs_can_be_refused(encoder, packs, tmp_path):
    said = []
    packs(no_capture)
    worker = encoder(write(tmp_path / "model", "bert", "AutoModel"), said, cuda_graphs=False)
    ready = worker.warm_up()
    assert said[0] == "texts are packed without padding" and len(said) == 2
    assert ready.packed and ready.graphed == 0


def test_graphs_that_later_captures_spoil_are_refused(encoder, packs, tmp_path):
    """As where two graphs share memory that they must not."""
    spoilt = threading.Event()
    packs(lambda compute: lambda: None if spoilt.is_set() else compute())
    worker = encoder(write(tmp_path / "model", "bert", "AutoModel"), step_tokens=512)
    worker.warm_up()
    spoilt.set()
    with pytest.raises(LoadError, match=r"proof: with cuda_graphs the model's output .*; set cuda_graphs to false"):
        worker.warm_up()


def test_packing_that_becomes_wrong_after_its_trial_is_refused(encoder, packs, tmp_path, monkeypatch):
    packs(no_capture)
    worker = encoder(write(tmp_path / "model", "bert", "AutoModel"), cuda_graphs=False)
    right = Spread.attend
    monkeypatch.setattr(Spread, "attend", lambda *given: right(*given) * 1.5)
    with pytest.raises(LoadError, match="set fused_kernels to false"):
        worker.warm_up()
