"""Output proof: what a model answers as it is served, beside what it answers by plain torch on the same weights.

It does not know what the ways differ in; it compares their logits and names the first one that is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backend.compute.quantized.product import plainly
from backend.errors import LoadError

ALLOWED = {torch.float32: 2e-3, torch.bfloat16: 0.08, torch.float16: 0.03, torch.float8_e4m3fn: 0.2}
"""Largest difference of a logit by dtype, as a share of the spread of all logits: several times what rounding makes.

With a cache of float8 whatever differs at all, in any dtype, makes some keys and values fall to their other neighbour,
up to an eighth away, and these the next layer's: logits of SmolLM2-135M then differ by up to 0.09 in bfloat16 and 0.04
in float32. With prompts whose activations are rounded to float8 they differ by 0.08.
"""

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


def check(ways: Mapping[str, Tensor], plain: Tensor, *dtypes: torch.dtype) -> float:
    """The difference of the last way, as it is served. LoadError names the first one past the bound.

    Each way is named after the parameter that switches off what it adds to the one before. `dtypes` are those that
    products and the cache have: the bound is the widest of theirs.
    """
    found, allowed = 0.0, max(ALLOWED[dtype] for dtype in dtypes)
    for parameter, logits in ways.items():
        found = allow(parameter, difference(logits, plain), allowed, "a logit", "the logits' spread")
    return found


def allow(parameter: str, found: float, allowed: float, what: str, unit: str) -> float:
    """The difference; LoadError where it is past the bound, or is no number."""
    if not found <= allowed:
        remedy = "serve it without" if parameter == "quantization" else f"set {parameter} to false"
        raise LoadError(
            f"output proof: with {parameter} {what} differs from the plain computation by {found:.3g} of {unit}, "
            f"{allowed:g} are allowed; {remedy}"
        )
    return found


@contextmanager
def plain_modules(model: nn.Module, products: bool = True) -> Iterator[None]:
    """Meanwhile every module computes by its own class's code, whatever has been put in its place.

    `products`: those with packed weights are torch's, too.
    """
    put = [
        (module, name, vars(module).pop(name))
        for module in model.modules()
        for name in ("forward", "project")
        if name in vars(module)
    ]
    try:
        with plainly(products):
            yield
    finally:
        for module, name, given in put:
            setattr(module, name, given)
