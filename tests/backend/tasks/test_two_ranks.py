"""qa and token_classification on two ranks: what one rank answers. Their heads are in compute/test_load_encoder.py."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_encoders
from serving_tasks import served

TEXT = "Anna Smith of Berlin loved São Paulo, isn't it? 東京 (film). " * 4
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}

CASES = {
    "qa": (
        "AutoModelForQuestionAnswering",
        {},
        [{"question": b"Who is it?", "context": (TEXT * 3).encode(), "max_seq_len": 48, "doc_stride": 16, "top_k": 3}],
    ),
    "token_classification": (
        "AutoModelForTokenClassification",
        {"id2label": LABELS, "initializer_range": 0.6},
        [{"text": TEXT.encode()}, {"text": b"Berlin"}],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_two_ranks_answer_as_one(task, tmp_path):
    auto, config, rows = CASES[task]
    folder = tiny_encoders.write(tmp_path, "bert", auto, **config)
    with served(task, folder) as ask:
        one = ask(*rows)
    with served(task, folder, tensor_parallel=2) as ask:
        two = ask(*rows)
    assert two.keys() == one.keys()
    for name, values in one.items():
        assert two[name].shape == values.shape and values.size
        if values.dtype.kind == "f":
            np.testing.assert_allclose(two[name], values, atol=1e-5)
        else:
            assert two[name].tolist() == values.tolist()
