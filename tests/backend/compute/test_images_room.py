"""Images that do not fit the device's memory: their batch gets an error, and the next one is computed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.compute.images.clip import Clip
from backend.compute.images.diffusion import Diffusion
from backend.config import EngineConfig
from backend.errors import ServingError
from backend.ranks.rank import Birth

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_diffusion
from tiny_clip import write_clip

torch.set_num_threads(1)


def birth(folder):
    return Birth("", EngineConfig(model=str(folder), device="cpu", threads=1), 0, 1, "", 0)


def fails_once(monkeypatch, owner, name):
    """The first call finds no memory."""
    usual, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_of_text_to_image(tmp_path, monkeypatch):
    worker = Diffusion(birth(tiny_diffusion.save("sd", tmp_path)), print)
    batch = {
        "prompts": ["one", "two"], "negative_prompts": None, "seeds": [1, 2], "images": None, "masks": None,
        "settings": {"num_inference_steps": 2},
    }  # fmt: skip
    fails_once(monkeypatch, worker, "_draw")
    errors = worker.forward(batch)
    assert all(isinstance(each, ServingError) and "lower max_pixels or max_images" in str(each) for each in errors)
    assert len(errors) == 2
    found = worker.forward(batch)
    images = [image for image, _ in (found() if callable(found) else found)]
    assert len(images) == 2 and images[0].dtype == np.uint8


@pytest.mark.parametrize(("in_parts", "count"), [(True, 2), (False, 1)])
def test_where_ranks_meet_one_without_memory_ends(in_parts, count, tmp_path, monkeypatch):
    """Or the others, who wait for its part of a sum, would take that of the next batch."""
    worker = Diffusion(birth(tiny_diffusion.save("sd", tmp_path)), print)
    monkeypatch.setattr(worker, "_world", 2)
    monkeypatch.setattr(worker, "_in_parts", in_parts)
    batch = {
        "prompts": ["one", "two"][:count], "negative_prompts": None, "seeds": [1, 2][:count], "images": None,
        "masks": None, "settings": {"num_inference_steps": 2},
    }  # fmt: skip
    fails_once(monkeypatch, worker, "_draw")
    with pytest.raises(torch.OutOfMemoryError):
        worker.forward(batch)


def test_of_zero_shot_image(tmp_path, monkeypatch):
    worker = Clip(birth(write_clip(tmp_path)), print)
    blank = np.zeros((64, 64, 3), np.uint8)
    batch = {"images": [blank], "ids": np.array([[0, 1], [0, 2]]), "lengths": np.array([2, 2]), "columns": [[0, 1]]}
    fails_once(monkeypatch, worker, "_pixels")
    (error,) = worker.forward(batch)
    assert isinstance(error, ServingError) and "1 images and 2 labels; lower max_texts" in str(error)
    (shares,) = worker.forward(batch)
    assert shares.sum() == pytest.approx(1.0)
    worker._split = True  # other ranks wait for this one
    fails_once(monkeypatch, worker, "_pixels")
    with pytest.raises(torch.OutOfMemoryError):
        worker.forward(batch)
