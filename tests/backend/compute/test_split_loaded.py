"""Models loaded by another library and split among two ranks, against the same models whole."""

import sys
from pathlib import Path

import pytest
import torch

from backend.compute.split_loaded import SPLITTABLE, unsplittable

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from split_ranks import compute, models, split_and_computed


@pytest.fixture(scope="module")
def answers():
    torch.set_num_threads(1)
    return split_and_computed(2)


@pytest.mark.parametrize("name", models())
def test_two_ranks_compute_what_the_whole_model_does(answers, name):
    expected = compute(models()[name])
    for rank in answers:
        found, share = rank[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert share < 0.9, "nothing was split"


def test_every_class_of_the_table_is_tried():
    assert {type(model).__name__ for model in models().values()} == set(SPLITTABLE)


def test_what_cannot_be_split_is_told():
    assert "no test shows" in unsplittable(torch.nn.Linear(2, 2), 2)
    made = models()
    assert unsplittable(made["t5"], 3) == ""
    assert unsplittable(made["clip"], 3) == "3 ranks cannot share its 4 attention heads"
