"""Places: the tensors of a module, wherever they hang, laid out in one piece of memory and put there as views.

It does not know where that memory is, nor what the tensors hold: weights, or the codes and scales of packed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNED = 256
"""Bytes at whose multiples tensors begin: as much as any kernel asks for."""
PAGE = 4096


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor hangs: an attribute, or a module's parameter."""

    owner: Any
    name: str
    tensor: Tensor
    """As it was found."""

    @property
    def storage(self) -> int:
        """The memory that it is a view of; tensors on the meta device have one too."""
        return int(self.tensor.untyped_storage()._cdata)

    def put(self, value: Tensor) -> None:
        """Hang this tensor there instead."""
        parameters = self.owner._parameters if isinstance(self.owner, nn.Module) else {}
        if self.name in parameters:
            parameters[self.name] = nn.Parameter(value, requires_grad=False)
        else:
            object.__setattr__(self.owner, self.name, value)  # of a frozen dataclass too


def empty_places(modules: Iterable[nn.Module]) -> list[Place]:
    """Every tensor on the meta device in these modules, and in what of ours hangs on them (merged, packed weights)."""
    seen: set[int] = set()
    return [place for module in modules for place in _of_module(module, seen) if place.tensor.is_meta]


def _of_module(module: nn.Module, seen: set[int]) -> Iterator[Place]:
    for each in module.modules():
        if id(each) in seen:
            continue
        seen.add(id(each))
        for name, parameter in each._parameters.items():
            if parameter is not None:
                yield Place(each, name, parameter)
        yield from _attributes(each, seen)


def _attributes(owner: Any, seen: set[int]) -> Iterator[Place]:
    for name, value in vars(owner).items():
        if isinstance(value, Tensor):
            yield Place(owner, name, value)
        elif _ours(value) and id(value) not in seen:
            seen.add(id(value))
            yield from _attributes(value, seen)


def _ours(value: Any) -> bool:
    return type(value).__module__.startswith("backend.") and hasattr(value, "__dict__") and _is_object(value)


def _is_object(value: Any) -> bool:
    return not isinstance(value, (nn.Module, type)) and not callable(value)


class Layout:
    """Where each memory that some places are views of lies in one piece of `nbytes`."""

    def __init__(self, places: list[Place]) -> None:
        self.places, self._starts, end = places, dict[int, int](), 0
        for place in places:
            if place.storage not in self._starts:
                self._starts[place.storage] = end
                size = place.tensor.untyped_storage().nbytes()
                end += -(-size // ALIGNED) * ALIGNED
        self.nbytes = max(1, -(-end // PAGE)) * PAGE  # what is read past the file system's cache comes in pages

    def put(self, memory: Tensor) -> None:
        """Hang views of the memory where the places are.  # uint8 [nbytes or more]"""
        for place in self.places:
            place.put(self._view(memory, place))

    def _view(self, memory: Tensor, place: Place) -> Tensor:
        like = place.tensor
        size = like.untyped_storage().nbytes()
        start = self._starts[place.storage]
        typed = memory[start : start + size].view(like.dtype)
        return typed.as_strided(like.shape, like.stride(), typed.storage_offset() + like.storage_offset())


def split_off(places: list[Place]) -> tuple[list[Place], list[Place]]:
    """Those worth streaming, and those that stay on the device: vectors, which fused kernels keep copies of."""
    wide = {place.storage for place in places if place.tensor.dim() > 1}
    return [each for each in places if each.storage in wide], [each for each in places if each.storage not in wide]


def on_device(places: list[Place], device: torch.device) -> int:
    """Give places memory on the device, as much as they need; its bytes."""
    total = 0
    for storage in dict.fromkeys(place.storage for place in places):
        layout = Layout([place for place in places if place.storage == storage])
        layout.put(torch.empty(layout.nbytes, dtype=torch.uint8, device=device))
        total += layout.nbytes
    return total
