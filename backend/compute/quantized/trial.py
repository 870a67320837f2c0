"""Trial: products with packed weights as they are served, beside torch's own on the same weights.

An output proof sees the programs for its prompts' tokens; here each kind of program that decoding may run has its turn,
for one weight of each form. It knows neither models nor kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from backend.compute.quantized.packed import Packed
from backend.compute.quantized.product import product
from backend.errors import LoadError

TOKENS = (1, 5, 16, 24, 48, 128, 200)
"""Some of every size for which products are cut into other programs (dense/packed_shape.py)."""
ROWS = 64
"""The first and the last of the weight are looked at."""
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.01}
"""Differences, relative to the largest value: some times what rounding each weight and each result makes."""


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
            found = _difference(weight, tokens)
            if not found <= ALLOWED[weight.dtype]:
                raise LoadError(
                    f"quantization: a product of {tokens} tokens with {weight.scheme.kind} weights "
                    f"{list(weight.shape)} differs from the plain computation by {found:.3g} of its largest value, "
                    f"{ALLOWED[weight.dtype]:g} are allowed; serve the model without quantization"
                )


def _difference(weight: Packed, tokens: int) -> float:
    rows, width = weight.shape
    generator = torch.Generator(weight.device).manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator, device=weight.device).to(weight.dtype)
    found, worst = product(x, weight, None), 0.0
    for start in {0, max(0, rows - ROWS)}:
        part = weight.rows(start, min(start + ROWS, rows))
        worst = max(worst, _off(found[:, start : start + ROWS], x.float() @ part.full().float().t()))
    return worst


def _off(found: Tensor, want: Tensor) -> float:
    """Infinite for what is no number."""
    error = (found.float() - want).abs().max() / want.abs().max().clamp(min=1e-12)
    return float(error) if bool(error.isfinite()) else float("inf")
