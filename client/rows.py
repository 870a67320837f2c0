"""Rows: what is asked becomes requests of a few rows each, their answers become results again, in order.

The tasks of one answer a request share it. It does not know what a task asks, nor what its rows mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from client.errors import InvalidInput, ServerError
from client.pipeline import Answer, Call
from client.tensors import Tensors, text

Array = NDArray[Any]
Columns = Mapping[str, Sequence[Sequence[bytes]]]
"""By input name, the values of each row."""
Row = dict[str, list[Any]]
"""One row of an answer: the values of each output."""
Result = TypeVar("Result")

MOST = 64
"""Rows of one request: a long list is sent in several, so that the server computes one while another is on its way."""


def texts(given: Sequence[str], what: str) -> list[list[bytes]]:
    """A column of one text a row."""
    return [[text(each, f"{what} {i}" if len(given) > 1 else what)] for i, each in enumerate(given)]


def listed(given: Any, what: str) -> list[Any]:
    """Several items; InvalidInput where a single one, or something else, was given."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence | np.ndarray):
        raise InvalidInput(f"{what} must be a list, not {given!r:.80}")
    return [*given]


def is_many(given: Any) -> bool:
    """Whether a list was given; a tuple is one item of two parts."""
    return isinstance(given, list | np.ndarray)


def order(columns: Columns) -> list[int]:
    """The rows as they are sent: where one request does not hold them, the longest first.

    Rows of a length then share requests: the server pads little, and a request is answered as soon as it is computed
    instead of waiting for the others.
    """
    count = len(next(iter(columns.values())))
    if count <= MOST:
        return [*range(count)]
    sizes = [sum(len(value) for column in columns.values() for value in column[row]) for row in range(count)]
    return sorted(range(count), key=lambda row: -sizes[row])


def cut(columns: Columns, options: Tensors, order: Sequence[int]) -> list[Tensors]:
    """Requests of at most MOST rows in this order; each option holds for every row."""
    return [_request(columns, options, order[start : start + MOST]) for start in range(0, len(order), MOST)]


def call(
    columns: Columns, options: Tensors, read: Callable[[Row], Result], outputs: Sequence[str], many: bool
) -> Call[Any]:
    """A result for each row, in the rows' own order; without `many` the only one."""
    sent = order(columns)
    questions = cut(columns, options, sent)

    def result(answers: list[Answer]) -> list[Result] | Result:
        came = [row for question, answer in zip(questions, answers, strict=True)
                for row in _rows(block(question, answer, outputs))]  # fmt: skip
        found = [read(came[at]) for at in np.argsort(sent)]
        return found if many else found[0]

    return Call(questions, result)


def block(question: Tensors, answer: Answer, outputs: Sequence[str]) -> dict[str, Array]:
    """The outputs of one request, each [rows, ...]; ServerError unless there are all of them for all its rows."""
    if len(answer) != 1:
        raise ServerError(f"the server gave {len(answer)} answers to one request; is this model of another task?")
    count = len(next(iter(question.values())))
    for name in outputs:
        if name not in answer[0]:
            raise ServerError(f"the server's answer has no {name}; is this model of another task?")
        if len(answer[0][name]) != count:
            raise ServerError(f"the server's answer has {len(answer[0][name])} rows of {name}, not {count}")
    return {name: answer[0][name] for name in outputs}


def _request(columns: Columns, options: Tensors, rows: Sequence[int]) -> Tensors:
    chosen: dict[str, Array] = {name: _bytes([column[row] for row in rows]) for name, column in columns.items()}
    count = len(next(iter(chosen.values())))
    return chosen | {name: np.repeat(value, count, axis=0) for name, value in options.items()}


def _bytes(column: Sequence[Sequence[bytes]]) -> Array:
    """As BYTES.  # [rows, k]"""
    array = np.empty((len(column), len(column[0])), np.object_)
    array[:] = column
    return array


def _rows(outputs: Mapping[str, Array]) -> list[Row]:
    columns = {name: array.reshape(len(array), -1).tolist() for name, array in outputs.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def items(row: Row, make: Callable[..., Result], there: Callable[[Result], bool]) -> list[Result]:
    """What a row holds: `make` takes a value of each output, in their order. Where not `there`, it is filling."""
    return [found for values in zip(*row.values(), strict=True) if there(found := make(*values))]
