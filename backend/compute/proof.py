"""Output proof: what a model answers as it is served, beside what it answers by plain torch on the same weights.

It does not know what the ways differ in; it compares their logits and names the first one that is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import LoadError

ALLOWED = {torch.float32: 2e-3, torch.bfloat16: 0.08, torch.float16: 0.03}
"""Largest difference of a logit by dtype, as a share of the spread of all logits: several times what rounding makes."""


PARTS = 0.05
"""Largest difference of what an encoder's or an image model's parts answer, as `distance` has it: several times what
rounding makes in half precision, and far less than a wrong mask."""


def distance(found: Tensor, plain: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    found, plain = found.float(), plain.float()
    return float((found - plain).abs().max() / plain.abs().max().clamp(min=1e-6))


def difference(found: Tensor, plain: Tensor) -> float:
    """The largest, as a share of the plain logits' spread; infinite where only one of them is a number."""
    found, plain = found.float(), plain.float()
    if not bool(torch.equal(found.isfinite(), plain.isfinite())):
        return float("inf")
    spread = (plain.amax(-1) - plain.amin(-1)).clamp(min=1e-6)
    return float(((found - plain).abs().amax(-1) / spread).nan_to_num().max())


def check(ways: Mapping[str, Tensor], plain: Tensor, dtype: torch.dtype) -> float:
    """The difference of the last way, as it is served. LoadError names the first one past the bound.

    Each way is named after the parameter that switches off what it adds to the one before.
    """
    found = 0.0
    for parameter, logits in ways.items():
        found = allow(parameter, difference(logits, plain), ALLOWED[dtype], "a logit", "the logits' spread")
    return found


def allow(parameter: str, found: float, allowed: float, what: str, unit: str) -> float:
    """The difference; LoadError where it is past the bound, or is no number."""
    if not found <= allowed:
        raise LoadError(
            f"output proof: with {parameter} {what} differs from the plain computation by {found:.3g} of {unit}, "
            f"{allowed:g} are allowed; set {parameter} to false"
        )
    return found


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Meanwhile every module computes by its own class's code, whatever has been put in its place."""
    put: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        if "forward" in vars(module):
            put.append((module, vars(module).pop("forward")))
    try:
        yield
    finally:
        for module, forward in put:
            module.forward = forward
