"""A model's repeated layers, called by the model one by one and computed as one: a function of tensors alone.

Each layer only notes what the model calls it with; the last one's call hands all that over. It knows no packing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, dtype, nn
from transformers import PreTrainedModel


class Given(Enum):
    """Stand-ins for what a layer gets from the one before, and in the attention mask's place."""

    HIDDEN = 1
    SPREAD = 2


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor of one value a token."""

    index: int
    shape: tuple[int, ...]
    """Of one token's value."""
    dtype: dtype


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """Any other tensor. No two are equal, so calls with one in them are equal to no others."""

    tensor: Tensor


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""One layer's arguments, tensors replaced by stand-ins."""


class Layers:
    """Stands for the layers' `forward`s while it is there. `run` gets all calls and the values of their slots.

    The first slot is the hidden states that enter the first layer; `run` returns those that leave the last one.
    `slotted` says of a tensor whether it has one value a token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slotted: Callable[[Tensor], bool],
        run: Callable[[list[Call], list[Tensor]], Tensor],
    ) -> None:
        self._layers, self._slotted, self._run = stack(model), slotted, run
        self._plain: dict[Any, Call] = {}
        self._forwards = [layer.forward for layer in self._layers]
        names = [*inspect.signature(self._forwards[0]).parameters]
        self._first, self._mask = names[0], names.index("attention_mask") if "attention_mask" in names else len(names)
        for index, layer in enumerate(self._layers):
            layer.forward = self._noting(index)

    def remove(self) -> None:
        """Leave the layers as they were."""
        for layer in self._layers:
            del layer.__dict__["forward"]

    def compute(self, calls: list[Call], values: list[Tensor], spread: Any) -> Tensor:
        """One layer after the other.  # values and result [1, tokens, ...]"""
        hidden = values[0]
        for forward, (args, kwargs) in zip(self._forwards, calls, strict=True):
            own = [_put(each, hidden, values, spread) for each in args]
            named = {name: _put(each, hidden, values, spread) for name, each in kwargs.items()}
            output = forward(*own, **named)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    def _noting(self, index: int) -> Callable[..., Tensor]:
        def note(*args: Any, **kwargs: Any) -> Tensor:
            return self._note(index, args, kwargs)

        return note

    def _note(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs[self._first]
        if not index:
            self._calls: list[Call] = []
            self._values, self._entering = [hidden], hidden
        if hidden is not self._entering or len(self._calls) != index:
            raise RuntimeError("the model computes something between its layers")
        self._calls.append(self._call(args, kwargs))
        if index + 1 < len(self._layers):
            return hidden
        calls, values = self._calls, self._values
        del self._calls, self._values, self._entering
        return self._run(calls, values)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The same object each time where there is nothing but hidden states and flags, as in most models."""
        if not all(each is None or each is True or each is False for each in (*args[1:], *kwargs.values())):
            return self._made(args, kwargs)
        key = (len(args), *args[1:], *kwargs.items())
        if (known := self._plain.get(key)) is None:
            known = self._plain[key] = self._made(args, kwargs)
        return known

    def _made(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if self._mask < len(args):
            args = (*args[: self._mask], Given.SPREAD, *args[self._mask + 1 :])
        else:
            kwargs["attention_mask"] = Given.SPREAD
        return self._stand_in(args), self._stand_in(kwargs)

    def _stand_in(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Given.HIDDEN if value is self._entering else self._slot(value)
        if isinstance(value, tuple):
            return tuple(map(self._stand_in, value))
        if isinstance(value, list):
            return [*map(self._stand_in, value)]
        if isinstance(value, dict):
            return {name: self._stand_in(each) for name, each in value.items()}
        return value

    def _slot(self, value: Tensor) -> Slot | Fixed:
        if not self._slotted(value):
            return Fixed(value)
        places = [index for index, known in enumerate(self._values) if known is value]
        if not places:
            self._values.append(value)
        return Slot(places[0] if places else len(self._values) - 1, tuple(value.shape[2:]), value.dtype)


def _put(value: Any, hidden: Tensor, values: list[Tensor], spread: Any) -> Any:
    """A stand-in's value."""
    if isinstance(value, Given):
        return hidden if value is Given.HIDDEN else spread
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, Fixed):
        return value.tensor
    if isinstance(value, tuple):
        return tuple(_put(each, hidden, values, spread) for each in value)
    if isinstance(value, list):
        return [_put(each, hidden, values, spread) for each in value]
    if isinstance(value, dict):
        return {name: _put(each, hidden, values, spread) for name, each in value.items()}
    return value


def stack(model: PreTrainedModel) -> nn.ModuleList:
    """The list of layers."""
    count = getattr(model.config, "num_hidden_layers", 0)
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise RuntimeError(f"{type(model).__name__} has no list of {count} layers")
    return found[0]
