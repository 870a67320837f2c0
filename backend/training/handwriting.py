"""scikit-learn's 1,797 handwritten digits: as pictures to learn from, and to judge drawn ones by. It knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional as F

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = ("a handwritten {}", "the digit {}", "a picture of a {}", "{}")
SIDE = 32
"""Pixels of a picture; the originals have 8."""


def real() -> tuple[Tensor, Tensor]:
    """The pictures as [n, 3, 32, 32] in -1..1, and their digits [n]."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(small, size=SIDE, mode="bicubic", align_corners=False).clamp(-1, 1)
    return large.expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def recogniser() -> SVC:
    """A classifier of the real digits, 8 x 8 numbers of 0..16 each."""
    data = load_digits()
    return SVC(gamma=0.001).fit(data.data, data.target)


def shrink(pictures: NDArray[np.float32]) -> NDArray[np.float64]:
    """Pictures [n, 32, 32, 3] in 0..1 as the recogniser reads them: [n, 64]."""
    n, cells = len(pictures), SIDE // 8
    grey = pictures.mean(axis=-1).reshape(n, 8, cells, 8, cells)
    small: NDArray[np.float64] = grey.mean(axis=(2, 4)).reshape(n, 64) * 16.0
    return small


def recognised(pipeline: Any, n: int) -> int:
    """How many of n digits, drawn in turn, are taken for what they were to be."""
    pipeline.set_progress_bar_config(disable=True)
    asked = [i % len(NAMES) for i in range(n)]
    prompts = [WORDINGS[0].format(NAMES[digit]) for digit in asked]
    seed = torch.Generator().manual_seed(1)
    drawn = pipeline(prompts, guidance_scale=4.0, num_inference_steps=20, output_type="np", generator=seed).images
    return int((recogniser().predict(shrink(drawn)) == np.array(asked)).sum())
