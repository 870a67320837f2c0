"""Output proof: what a model answers as it is served, beside what it answers by plain torch on the same weights.

It does not know what the ways differ in; it compares their logits and names the first one that is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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

TIMES, MOST = 3, 0.4
"""A model may amplify what rounding does to it more than the usual one (one of 80 layers of random weights does). Then
logits may differ by so many times the noise that rounding makes there (see `shaken`), and never by more than MOST:
unrelated logits differ by 0.7 of their spread.
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


def check(
    ways: Mapping[str, Tensor], plain: Tensor, *dtypes: torch.dtype, noise: Callable[[], float] = lambda: 0.0
) -> float:
    """The difference of the last way, as it is served. LoadError names the first one past the bound.

    Each way is named after the parameter that switches off what it adds to the one before. `dtypes` are those that
    products and the cache have: the bound is the widest of theirs, or TIMES the `noise` (asked for only then), if that
    is more.
    """
    found, allowed, asked = 0.0, max(ALLOWED[dtype] for dtype in dtypes), False
    for parameter, logits in ways.items():
        found = difference(logits, plain)
        if allowed < found <= MOST and not asked:
            allowed, asked = max(allowed, min(MOST, TIMES * noise())), True
        allow(parameter, found, allowed, "a logit", "the logits' spread")
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


@contextmanager
def shaken(layers: Iterable[nn.Module], *dtypes: torch.dtype) -> Iterator[None]:
    """Meanwhile what each layer adds to its input is off as if it had been rounded to the coarsest of these dtypes.

    By a random part of up to half a unit in the last place, the same on every rank and each time.
    """
    unit = max(torch.finfo(dtype).eps for dtype in dtypes) / 2

    def shake(seed: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            found = (output[0] if isinstance(output, tuple) else output).float()
            generator = torch.Generator(found.device).manual_seed(seed)
            share = torch.rand(found.shape, generator=generator, device=found.device) * 2 - 1
            shaken = (found + (found - hidden) * share * unit).to(hidden.dtype)
            return (shaken, *output[1:]) if isinstance(output, tuple) else shaken

        return hook

    hooks = [layer.register_forward_hook(shake(seed), with_kwargs=True) for seed, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
