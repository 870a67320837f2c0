"""Parameter: one thing that a caller may set, and PARAMETERS, the table of them all. It does not know their defaults.

config.pbtxt, the documentation and every check follow the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np

from backend.errors import InvalidInput

INT32, UINT64 = 2**31 - 1, 2**64 - 1


@dataclass(frozen=True)
class Parameter:
    """One thing that a caller may set."""

    name: str
    type: str
    """Triton's: BOOL, INT32, UINT64, FP32, BYTES."""
    meaning: str
    low: float = -inf
    high: float = inf
    open: bool = False
    """Whether `low` itself is refused."""
    many: bool = False
    """Whether it is a list (one value alone is a list of one)."""
    aliases: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    """The names under which it is a tensor of the model too; the others are keys of JSON only."""
    key: str = ""
    """The configuration's parameter that bounds it: the length of a list, else `high`."""

    def read(self, name: str, value: object, most: int = INT32) -> Any:
        """The value as bool, int, float, str or a tuple of `most` of them; InvalidInput names it as the caller did."""
        if not self.many:
            return self._one(name, value)
        values = value if isinstance(value, list | tuple) else [value]
        values = [each for each in values if each != b""]  # rows of one tensor are equally long: it fills shorter ones
        check(len(values) <= most, f"{name} has {len(values)} values, the limit is {self._limit(most)}")
        return tuple(self._one(f"{name}[{at}]", each) for at, each in enumerate(values))

    def _one(self, name: str, value: object) -> Any:
        kind, reader = _READERS[self.type]
        try:
            found = reader(_plain(value))
        except (ValueError, TypeError, OverflowError, KeyError):
            raise InvalidInput(f"{name} must be {kind}, not {shown(value)}") from None
        if self.type not in ("BOOL", "BYTES") and not self._within(found):
            raise InvalidInput(f"{name} must be {self.range}, not {shown(found)}")
        return found

    def _within(self, value: float) -> bool:
        return self.low < value <= self.high if self.open else self.low <= value <= self.high

    @property
    def range(self) -> str:
        """The permitted numbers, in words."""
        return f"{'above' if self.open else 'at least'} {self.low} and at most {self._limit(self.high)}"

    def _limit(self, limit: float) -> str:
        """With the name under which an operator can raise it."""
        return f"{limit} ({self.key})" if self.key else str(limit)


def _flag(name: str, meaning: str, aliases: tuple[str, ...] = (), given: bool = True) -> Parameter:
    return Parameter(name, "BOOL", meaning, aliases=aliases, inputs=(name,) if given else ())


def _number(name: str, type_: str, low: float, high: float, meaning: str, **more: Any) -> Parameter:
    return Parameter(name, type_, meaning, low, high, **{"inputs": (name,), **more})


PARAMETERS = (
    _flag("stream", "deltas as they come, instead of one response"),
    _number("max_tokens", "INT32", 1, INT32, "new tokens at most", aliases=("max_new_tokens",)),
    _number(
        "min_tokens", "INT32", 0, INT32, "new tokens before an end token may come",
        aliases=("min_length", "min_new_tokens"), inputs=("min_tokens", "min_length"),
    ),
    _number("max_length", "INT32", 1, INT32, "tokens of prompt and completion at most", inputs=()),
    _number("temperature", "FP32", 0, 100, "divides the logits; 0 is greedy"),
    _flag("do_sample", "false is greedy, whatever the temperature", given=False),
    _number("top_p", "FP32", 0, 1, "the most likely tokens of this probability together", open=True),
    _number("top_k", "INT32", -1, INT32, "this many most likely tokens; 0 or -1 is off"),
    _number("min_p", "FP32", 0, 1, "tokens of at least this share of the greatest probability"),
    _number("repetition_penalty", "FP32", 0.0625, 100, "divides the odds of tokens of prompt and completion; 1 is off"),
    _number("frequency_penalty", "FP32", -2, 2, "subtracted for each occurrence in the completion"),
    _number("presence_penalty", "FP32", -2, 2, "subtracted for tokens that occur in the completion"),
    _number(
        "seed", "UINT64", 0, UINT64, "fixes every draw; random if not given",
        aliases=("random_seed",), inputs=("seed", "random_seed"),
    ),
    _number("n", "INT32", 1, INT32, "samples for each prompt"),
    Parameter(
        "stop_words", "BYTES", "strings that end the text and are cut off",
        many=True, aliases=("stop",), inputs=("stop_words",), key="max_stop_strings",
    ),
    _number("stop_token_ids", "INT32", 0, INT32, "tokens that end the text", many=True),
    _flag("ignore_eos", "go on after the model's own end tokens"),
    _flag("exclude_input_in_output", "whether the text leaves out the prompt; true if streaming, else false"),
    _flag("return_full_text", "the contrary of exclude_input_in_output", given=False),
    _flag("return_finish_reason", "answer with finish_reason"),
    _flag("return_num_input_tokens", "answer with num_input_tokens"),
    _flag("return_num_output_tokens", "answer with num_output_tokens"),
    _flag("return_cumulative_logprob", "answer with cumulative_logprob"),
    _flag("return_logprobs", "answer with logprobs"),
    _number("priority", "INT32", -INT32 - 1, INT32, "lower goes first; 0 if not given", inputs=()),
    _number("timeout", "UINT64", 0, UINT64, "µs from arrival until the request ends; 0 is none", inputs=()),
    Parameter("cache_salt", "BYTES", "requests share cached prefixes only with those of the same salt"),
)  # fmt: skip

NAMED = {name: parameter for parameter in PARAMETERS for name in (parameter.name, *parameter.aliases)}
"""By every name a caller may use."""


def check(holds: bool, message: str) -> None:
    """InvalidInput with this message unless it holds."""
    if not holds:
        raise InvalidInput(message)


def _plain(value: object) -> object:
    """Numpy's scalars as Python's, bytes as text."""
    if isinstance(value, np.generic):
        value = value.item()
    return value.decode() if isinstance(value, bytes) else value


def shown(value: object) -> str:
    """Short, in one line and ASCII, whatever the caller sent."""
    if isinstance(value, dict | list | tuple):
        return f"a {'JSON object' if isinstance(value, dict) else 'list'}"
    try:
        text = ascii(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        text = "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."


_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def _real(value: object) -> int | float:
    if isinstance(value, str):
        if not _DECIMAL.fullmatch(text := value.strip()):
            raise ValueError
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return value


def _integer(value: object) -> int:
    number = _real(value)
    if number != int(number):  # NaN and infinity cannot be made int, and raise
        raise ValueError
    return int(number)


def _finite(value: object) -> float:
    number = float(_real(value))
    if not isfinite(number):
        raise ValueError
    return number


def _boolean(value: object) -> bool:
    if isinstance(value, str):
        return {"true": True, "false": False}[value.strip().lower()]
    if isinstance(value, bool):
        return value
    raise TypeError


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a lone surrogate raises
    return value


_READERS: dict[str, tuple[str, Callable[[object], Any]]] = {
    "BOOL": ("true or false", _boolean),
    "INT32": ("an integer", _integer),
    "UINT64": ("an integer", _integer),
    "FP32": ("a finite number", _finite),
    "BYTES": ("a string of valid Unicode", _string),
}
