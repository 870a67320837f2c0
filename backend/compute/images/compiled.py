"""A pipeline's models under torch.compile: learnt as it warms up, as they are where that fails. It knows no requests.

Compiled once for any number of rows, and once more for a single row, which torch takes for a case of its own; a model
whose code fixes the number, for each that is met while learning. Other sizes of images than those run as they are: no
request waits for a compiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from backend.compute.images.graphs import signature
from backend.compute.images.pipeline import denoiser_of
from backend.errors import one_line

TOLERANCE = 0.05
"""Compiled against plain in half precision, relative to the largest value; a wrong kernel shows as far more."""

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""What diffusers calls fused projections, and what they are made of."""


def compiled(pipeline: Any, say: Callable[[str], None], with_denoiser: bool = True) -> list[Compiled]:
    """Have the models that take the time compiled, once they are called."""
    decoder, denoiser = Compiled(pipeline.vae.decoder, "decoder", say), denoiser_of(pipeline)
    if not with_denoiser:  # DeepSpeed's layers meet the other ranks, which a compiler does not see through
        return [decoder]
    fuse(denoiser)
    return [Compiled(denoiser, "denoiser", say), decoder]


def fuse(denoiser: Any) -> None:
    """Queries, keys and values by one product, in the memory of one: diffusers' own way, where the model has it."""
    if not hasattr(denoiser, "fuse_qkv_projections"):
        return
    with suppress(ValueError):  # attention over added keys
        denoiser.fuse_qkv_projections()
    for module in denoiser.modules():
        for whole, parts in FUSED.items():
            if hasattr(module, whole):
                _share_memory(getattr(module, whole), [getattr(module, part) for part in parts])


def _share_memory(whole: nn.Linear, parts: list[nn.Linear]) -> None:
    """Make the separate projections views of the fused one."""
    sizes = [part.out_features for part in parts]
    for part, weight in zip(parts, whole.weight.data.split(sizes), strict=True):
        part.weight.data = weight
    if whole.bias is not None:
        for part, bias in zip(parts, whole.bias.data.split(sizes), strict=True):
            part.bias.data = bias


class Compiled:
    """Stands for a model's `forward`; compiles it for the shapes that it meets before `settle` is called."""

    def __init__(self, model: nn.Module, name: str, say: Callable[[str], None], backend: Any = "inductor") -> None:
        self._plain, self._name, self._say = model.forward, name, say
        self._compiled = torch.compile(self._plain, dynamic=False, backend=backend)
        self._any_rows = True
        self._known: set[Any] = set()
        self._beyond: set[Any] = set()  # numbers of rows that the compiler's guards turn down
        self._learning = True
        model.forward = self  # as the pipeline calls it

    def __call__(self, *values: Any, **named: Any) -> Any:
        leaves, shape = tree_flatten((values, named))
        leaves = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        values, named = tree_unflatten(leaves, shape)
        rows = next(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor))
        form = (str(shape), *(_beside(leaf, rows) for leaf in leaves))
        known = (form, self._case(rows)) in self._known
        if self._learning and not known:
            return self._learn(form, rows, values, named)
        if not known or (form, rows) in self._beyond:
            return self._plain(*values, **named)
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                return self._compiled(*values, **named)
        except RuntimeError as error:
            if "recompile" not in str(error):
                raise
        self._beyond.add((form, rows))
        self._say(f"{rows} rows of the {self._name} run as they are: what was compiled does not hold for them")
        return self._plain(*values, **named)

    def _case(self, rows: int) -> bool | int:
        """What has a compilation of its own: a single row, or each number of them."""
        return rows == 1 if self._any_rows else rows

    def settle(self) -> None:
        """Compile nothing from now on."""
        self._learning = False

    def _learn(self, form: Any, rows: int, values: Any, named: Any) -> Any:
        """Compile, compare once, and take the plain model for ever where either fails."""
        self._say(f"compiling the {self._name}: up to a minute, seconds where it was compiled before")
        start, usual = time.monotonic(), self._plain(*values, **named)
        reason = self._trial(rows, values, named, usual)
        if reason:
            self._learning = False
            self._known.clear()
            self._say(f"the {self._name} is not compiled: {reason}")
        else:
            self._known.add((form, self._case(rows)))
            self._say(f"the {self._name} is compiled, {time.monotonic() - start:.0f} s")
        return usual

    def _trial(self, rows: int, values: Any, named: Any, usual: Any) -> str:
        """Why the compiled model cannot be used; empty if it can."""
        try:
            if rows > 1 and self._any_rows:
                _free_rows((values, named), rows)
            difference = distance(self._compiled(*values, **named), usual)
        except Exception as error:  # a compiler's failures have no common class
            if self._any_rows and "Constraints violated" in str(error):
                self._any_rows = False
                values, named = tree_map(_unmarked, (values, named))
                return self._trial(rows, values, named, usual)
            return one_line(error, 300)
        return "" if difference < TOLERANCE else f"its result differs by {difference:.3g}"


def _beside(leaf: Any, rows: int) -> Any:
    """What a compiled model depends on beside the number of rows."""
    if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == rows:
        return "rows", tuple(leaf.shape[1:]), leaf.dtype
    return signature(leaf)


def _unmarked(leaf: Any) -> Any:
    """The same values without what the compiler was told of them."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _free_rows(given: Any, rows: int) -> None:
    """Tell the compiler that the number of rows will be another one each time."""
    for leaf in tree_flatten(given)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == rows:
            torch._dynamo.mark_dynamic(leaf, 0)


def distance(found: Any, usual: Any) -> float:
    """The largest difference between two answers' tensors, relative to the largest value; NaN where any is."""
    pairs = zip(tree_flatten(found)[0], tree_flatten(usual)[0], strict=True)
    tensors = [(a.float(), b.float()) for a, b in pairs if isinstance(b, Tensor)]
    found = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in tensors]
    return float("nan") if any(map(isnan, found)) else max(found)


def dismiss_compilers() -> None:
    """End the processes that compiled: nothing will be compiled any more."""
    with suppress(ImportError, OSError, RuntimeError):
        from torch._inductor.async_compile import shutdown_compile_workers

        shutdown_compile_workers()
