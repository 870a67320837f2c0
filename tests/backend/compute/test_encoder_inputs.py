"""Every number of a micro-batch arrives where it belongs."""

import numpy as np
import pytest
import torch

from backend.compute.encoders.inputs import Inputs
from backend.tasks.text import Texts

LENGTHS = [3, 1, 4]
BATCH = Texts(np.arange(10, 18, dtype=np.int32), np.array([0, 1, 3] + [1] * 5, np.int32), np.array(LENGTHS), [{}] * 3)


def made(batch=BATCH, padding=7, kinds=2, graphs=False):
    return Inputs.of(batch, padding, kinds, torch.device("cpu"), graphs)


def test_padded():
    inputs = made()
    assert inputs.ids.tolist() == [[10, 11, 12, 7], [13, 7, 7, 7], [14, 15, 16, 17]]
    assert inputs.mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert inputs.types.tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert {each.dtype for each in (inputs.ids, inputs.mask, inputs.types)} == {torch.int64}


@pytest.mark.parametrize("kinds", [0, 1])
def test_a_model_of_one_kind_of_tokens(kinds):
    assert made(kinds=kinds).types.sum() == 0


@pytest.mark.parametrize("graphs", [False, True])
def test_layout(graphs):
    layout = made(graphs=graphs).layout
    assert (layout.rows, layout.longest) == (3, 4) and layout.starts.dtype == torch.int32
    assert layout.starts[:4].tolist() == [0, 3, 4, 8]
    assert len(layout.starts) == (layout.bucket.sequences + 1 if graphs else 4)
    assert layout.places.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]


def test_there_and_back():
    layout = made().layout
    padded = torch.arange(24.0).view(3, 4, 2)
    packed = layout.pack(padded)
    assert packed.shape == (1, 8, 2)
    whole = layout.unpack(packed)
    assert torch.equal(whole, padded * made().mask[..., None])


def test_what_is_alike_in_all_rows():
    positions = torch.arange(4)[None]
    assert made().layout.pack(positions).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]


def test_into_a_larger_tensor():
    layout, out = made().layout, torch.full((1, 12, 2), -1.0)
    layout.pack(torch.arange(24.0).view(3, 4, 2), out)
    assert torch.equal(out[:, :8], layout.pack(torch.arange(24.0).view(3, 4, 2))) and (out[:, 8:] == -1).all()
