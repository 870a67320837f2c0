"""Options' values by kind: checked, typed, as tensors of shape [1, k]. It knows no task, nor what is in range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.errors import InvalidInput
from client.tensors import strings, text


@dataclass(frozen=True)
class Key:
    """One option of a task: its value's kind (see KINDS), a line of help, the tensor that carries it."""

    name: str
    kind: str
    help: str
    tensor: str = ""


def table(*keys: tuple[str, str, str]) -> dict[str, Key]:
    """Options by name, from name, kind and help of each; the tensor has the option's name."""
    return {name: Key(name, kind, about, name) for name, kind, about in keys}


def tensors(keys: Mapping[str, Key], given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors of what is given; None leaves it to the model. InvalidInput names an option that is not known."""
    if unknown := sorted(given.keys() - keys.keys()):
        raise InvalidInput(f"unknown option {unknown[0]!r}; known: {', '.join([*keys, 'timeout'])}")
    chosen = {name: value for name, value in given.items() if value is not None}
    return {keys[name].tensor: KINDS[keys[name].kind](name, value) for name, value in chosen.items()}


def _integer(low: int, high: int, dtype: type[np.generic]) -> Callable[[str, Any], NDArray[Any]]:
    def row(name: str, value: Any) -> NDArray[Any]:
        return np.array([[_whole(name, value, low, high)]], dtype)  # [1, 1]

    return row


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidInput(f"{name} must be a whole number, not {value!r}")
    number = int(value)
    if not low <= number <= high:
        raise InvalidInput(f"{name} must be from {low} to {high}, not {_shown(number)}")
    return number


def _integers(name: str, value: Any) -> NDArray[Any]:
    values = [value] if isinstance(value, int) else _items(name, value)
    return np.array([[_whole(name, item, *_INT32) for item in values]], np.int32)  # [1, k]


def _float(name: str, value: Any) -> NDArray[Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InvalidInput(f"{name} must be a number, not {value!r}")
    if not abs(value if isinstance(value, int) else float(value)) <= _FP32_MAX:  # nan too; no float holds some integers
        raise InvalidInput(f"{name} must be a finite number, not {_shown(value)}")
    return np.array([[value]], np.float32)  # [1, 1]


def _bool(name: str, value: Any) -> NDArray[Any]:
    if not isinstance(value, bool | np.bool_):
        raise InvalidInput(f"{name} must be True or False, not {value!r}")
    return np.array([[value]], np.bool_)  # [1, 1]


def _string(name: str, value: Any) -> NDArray[Any]:
    return strings(text(value, name))


def _strings(name: str, value: Any) -> NDArray[Any]:
    return strings(*(text(item, name) for item in ([value] if isinstance(value, str) else _items(name, value))))


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidInput(f"{name} must be a list, not {value!r}")
    return list(value)


def _shown(value: object) -> str:
    """A number in an error: Python refuses to write out an integer of some thousand digits."""
    bits = value.bit_length() if isinstance(value, int) else 0
    return f"an integer of {bits} bits" if bits > 128 else repr(value)


_FP32_MAX = float(np.finfo(np.float32).max)

_INT32 = (-(2**31), 2**31 - 1)

KINDS: dict[str, Callable[[str, Any], NDArray[Any]]] = {
    "int32": _integer(*_INT32, np.int32),
    "uint64": _integer(0, 2**64 - 1, np.uint64),
    "int32s": _integers,
    "fp32": _float,
    "bool": _bool,
    "string": _string,
    "strings": _strings,
}
"""By kind: name and value -> tensor [1, k]; InvalidInput that names the value."""
