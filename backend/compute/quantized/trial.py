"""Trial: products with packed weights as they are served, beside torch's own on the same weights.

An output proof sees the programs for its prompts' tokens; here each kind of program that decoding may run has its turn,
for one weight of each form. It knows neither models nor kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf, isfinite

import torch
from torch import nn

from backend.compute.dense.packed_shape import SCALED
from backend.compute.proof import allow, distance
from backend.compute.quantized.packed import Packed
from backend.compute.quantized.product import product

TOKENS = (1, 5, 16, 24, 48, 128, 200)
"""Some of every size for which products are cut into other programs (dense/packed_shape.py)."""
ROWS = 64
"""The first and the last of the weight are looked at."""
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.01}
"""Differences, relative to the largest value: some times what rounding each weight and each result makes."""
ROUNDED = 0.06
"""The same with fp8, of which many tokens' activations are rounded to 3 bits too."""


def multiplied(model: nn.Module) -> Iterator[Packed]:
    """One weight of each form, merged ones as a whole."""
    seen = set()
    for module in model.modules():
        weight = getattr(getattr(module, "group", module), "weight", None)
        if isinstance(weight, Packed):
            form = (weight.shape, weight.scheme, weight.dtype, weight.offset is None, weight.order is None)
            if form not in seen:
                seen.add(form)
                yield weight


@torch.inference_mode()
def tried(weights: Iterable[Packed]) -> None:
    """LoadError where a product differs."""
    for weight in weights:
        for tokens in TOKENS:
            rounds = weight.by_row and weight.dtype is torch.bfloat16 and tokens >= SCALED
            allowed = ROUNDED if rounds else ALLOWED[weight.dtype]
            what = f"a product of {tokens} tokens with {weight.scheme.kind} weights {list(weight.shape)}"
            allow("quantization", _difference(weight, tokens), allowed, what, "its largest value")


def _difference(weight: Packed, tokens: int) -> float:
    """Infinite for what is no number."""
    rows, width = weight.shape
    generator = torch.Generator(weight.device).manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator, device=weight.device).to(weight.dtype)
    ends = ((0, min(ROWS, rows)), (max(0, rows - ROWS), rows))
    found = product(x, weight, None)
    off = distance(
        torch.cat([found[:, start:stop] for start, stop in ends], 1),
        x.float() @ torch.cat([weight.rows(*each).full() for each in ends]).float().t(),
    )
    return off if isfinite(off) else inf
