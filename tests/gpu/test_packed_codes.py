"""Codes in registers, by PTX, against what each of them means.

It needs CUDA. TRITON_INTERPRET=1 runs it on CPU, where OpenAI Triton is installed: tests/fakes/ptx.py plays the PTX.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from ptx import played  # noqa: E402

from backend.compute.dense.packed_codes import LEVELS, numbers, scaled, steps  # noqa: E402

WORDS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
"""Every two bytes of codes."""


@pytest.fixture(autouse=True)
def _ptx() -> Iterator[None]:
    with played() if INTERPRETED else nullcontext():
        yield


@triton.jit
def _numbers_kernel(result, q, PLACE: tl.constexpr, LEVELS: tl.constexpr):
    at = tl.program_id(0) * 2048 + tl.arange(0, 2048)
    tl.store(result + at, numbers(tl.load(q + at), PLACE, LEVELS, True))


def meant(kind: str, place: int) -> Tensor:
    """Of each two bytes, the lower one first; int4's even column is the high half of its byte."""
    low, high = WORDS & 255, WORDS >> 8 & 255
    if kind == "int4":
        byte = (low, low, high, high)[place]
        return ((byte >> 4 if place % 2 == 0 else byte & 15) - 8).float()
    byte = (low, high)[place].to(torch.uint8)
    return byte.view(torch.float8_e4m3fn).float() if kind == "fp8" else byte.float() - 128


@pytest.mark.parametrize(
    ("kind", "place"), [*(("int4", at) for at in range(4)), *((k, at) for k in ("int8", "fp8") for at in (0, 1))]
)
def test_every_code_in_every_place(kind: str, place: int) -> None:
    """NaN of fp8, which no weight has, is another number."""
    result = torch.zeros(len(WORDS), dtype=torch.bfloat16, device=DEVICE)
    _numbers_kernel[(len(WORDS) // 2048,)](result, WORDS.to(DEVICE), PLACE=place, LEVELS=LEVELS[kind])
    expected = meant(kind, place)
    known = ~expected.isnan()
    assert torch.equal(result.cpu().float()[known], expected[known])
    assert bool((torch.signbit(result.cpu()) == torch.signbit(expected))[known & (expected == 0)].all())


@triton.jit
def _scaled_kernel(result, w, each, middle):
    at = tl.arange(0, 1024)
    tl.store(result + at, scaled(tl.load(w + at), tl.load(each + at), tl.load(middle + at), True))


def test_weights_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    w, each, middle = (torch.randn(1024, generator=generator).bfloat16().to(DEVICE) for _ in range(3))
    result = torch.zeros(1024, dtype=torch.bfloat16, device=DEVICE)
    _scaled_kernel[(1,)](result, w, each, middle)
    assert torch.equal(result, (w.double() * each.double() + middle.double()).bfloat16())


@triton.jit
def _steps_kernel(result, scale):
    at = tl.arange(0, 1024)
    tl.store(result + at, steps(scale + at, True, True))


def test_a_rough_reciprocal_is_within_a_unit_in_the_last_place() -> None:
    scale = torch.rand(1024, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 0.01
    result = torch.zeros(1024, device=DEVICE)
    _steps_kernel[(1,)](result, scale)
    assert float((result.double() * scale.double() - 1).abs().max()) < 2**-22
