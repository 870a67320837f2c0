"""Witness: one call of a model before anything was put in its place, to be made again by what serves.

It knows no pipeline. Part of the output proof; see backend.compute.proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from backend.compute.images.compiled import distance
from backend.compute.proof import PARTS, allow

Model = Callable[..., Any]


class Witness:
    """The last plain call that it saw, with values of its own."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self._values: tuple[Any, ...] | None = None
        self._named: dict[str, Any] = {}
        self._answer: Any = None
        self._dtypes: dict[str, torch.dtype] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile calls are seen."""
        hook = self.model.register_forward_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _see(self, model: nn.Module, values: tuple[Any, ...], named: dict[str, Any], answer: Any) -> None:
        if not any(isinstance(leaf, Tensor) for leaf in tree_flatten(answer)[0]):
            return  # an answer that cannot be looked into: neither compiling nor graphs take it
        self._values, self._named, self._answer = tree_map(_own, (values, named, answer))
        self._dtypes = _dtypes(model)

    def confirm(self, ways: Mapping[str, Model]) -> float:
        """The largest difference of the last way; LoadError names the first one past the bound, as proof's `check`."""
        found = 0.0
        with self._as_called():
            for parameter, way in ways.items() if self._values is not None else ():
                for _ in range(2):  # what captures graphs does so at the second call
                    answer = way(*(self._values or ()), **self._named)
                found = allow(parameter, distance(answer, self._answer), PARTS, f"the {self.name}", "its largest value")
        return found

    @contextmanager
    def _as_called(self) -> Iterator[None]:
        """Meanwhile its weights have the dtypes of that call: some pipelines decode in float32 and go back."""
        before = _dtypes(self.model)
        self._cast(self._dtypes)
        try:
            yield
        finally:
            self._cast(before)

    def _cast(self, dtypes: Mapping[str, torch.dtype]) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes.get(name, parameter.dtype):
                parameter.data = parameter.data.to(dtypes[name])


@contextmanager
def watching(witnesses: Iterable[Witness]) -> Iterator[None]:
    """All of them."""
    with ExitStack() as stack:
        for witness in witnesses:
            stack.enter_context(witness.watching())
        yield


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def _own(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
