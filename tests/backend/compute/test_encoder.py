"""Encoder, a rank's worker, in this process: each sequence's answer is what the model makes of it alone."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from tiny_encoders import write

from backend.compute.encoder import Encoder
from backend.config import EngineConfig
from backend.ranks.rank import Birth
from backend.tasks import TASKS
from backend.tasks.text import Piece, Texts, TextTask


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

    def make(folder, **settings):
        scratch = tmp_path / "ranks"
        scratch.mkdir(exist_ok=True)
        config = EngineConfig(model=str(folder), device="cpu", threads=1, **({"step_tokens": 64} | settings))
        birth = Birth("", config, 0, 1, str(scratch), os.getpid(), "whole")
        return Encoder(birth, lambda text: None)

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
    assert worker.warm_up() is None
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
