"""Products with codes as checkpoints hold them: zero points, and groups of scattered columns (GPTQ's desc_act).

They need CUDA. TRITON_INTERPRET=1 runs them on CPU, where OpenAI Triton is installed.
"""

from __future__ import annotations

import os

import pytest
import torch

from backend.compute.quantized.packed import Packed, Scheme

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
from backend.compute.dense import packed, packed_full, reference  # noqa: E402


def stored(kind: str, ordered: bool, dtype: torch.dtype) -> Packed:
    """Random codes of a weight [192, 256]."""
    torch.manual_seed(3)
    levels = 16 if kind == "int4" else 256
    weight = Packed.empty(Scheme(kind, 64, symmetric=False, stored=True, ordered=ordered), 192, 256, dtype, DEVICE)
    weight.codes.random_(256)
    weight.scale.uniform_(0.5, 1.5).mul_(0.2 / levels).copy_(weight.scale.half())
    assert weight.offset is not None
    assert (weight.order is not None) == ordered
    weight.offset.copy_(-weight.scale * torch.randint(levels, weight.scale.shape, device=DEVICE))
    if weight.order is not None:
        weight.order.copy_(torch.randperm(256, device=DEVICE))
    return weight


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_products(kind: str, ordered: bool, tokens: int) -> None:
    dtype = torch.float16
    weight = stored(kind, ordered, dtype)
    x, gain = torch.randn(tokens, 256, device=DEVICE).to(dtype), torch.rand(256, device=DEVICE).to(dtype)
    full = weight.full()
    if not ordered:
        assert torch.equal(packed_full.unpacked(weight, torch.empty_like(full)), full)
    for norm in (None, (gain, 1e-5)):
        want = reference.linear(x.float(), full.float(), None, None, norm, None)
        found = packed.linear(x, weight, None, None, norm, None).float()
        assert (found - want).abs().max() < 3e-3 * want.abs().max()
