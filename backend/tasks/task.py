"""Task: what a task of one answer a request must do; its requests, devices and Triton are not its business.

The stub parses each row into an *item*; an item becomes *pieces* (what a device computes: a sequence, an image); pieces
that run together are a *micro-batch*; the ranks answer with one array a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from backend.config import EngineConfig
from backend.errors import InvalidInput, ServingError

Array = NDArray[Any]
Row = dict[str, Any]
"""One row of a request by input name: scalars, or lists for inputs of dims [-1]; BYTES are bytes."""


class Task(Protocol):
    """One served model's task, on the CPU; it imports neither torch nor transformers."""

    worker: ClassVar[str]
    """module:class that the ranks run: `forward(batch)` gives one array a piece, `warm_up()` runs the largest batch."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        """LoadError where the folder does not hold such a model."""

    def parse(self, row: Row) -> Any:
        """An item; InvalidInput for a bad value."""

    def prepare(self, items: Sequence[Any]) -> list[list[Any] | ServingError]:
        """Each item's pieces, or why it cannot be served."""

    def cut(self, pieces: Sequence[Any]) -> list[list[int]]:
        """Micro-batches: which pieces run together."""

    def batch(self, pieces: Sequence[Any]) -> Any:
        """What the ranks get of a micro-batch."""

    def join(self, answers: list[Any]) -> list[Array]:
        """One array a piece, from the answers of all ranks."""

    def finish(self, item: Any, pieces: Sequence[Any], answers: Sequence[Array]) -> Any:
        """An item's result, from its pieces and their arrays."""

    def outputs(self, results: Sequence[Any]) -> dict[str, Array]:
        """A request's rows by output name, each [rows, ...]."""


def text_of(row: Row, name: str, limit: int) -> str:
    """A required text of max_prompt_bytes at most; InvalidInput where it is missing, longer or not UTF-8."""
    if name not in row:
        raise InvalidInput(f"{name} is missing")
    text = decode(row[name], name)
    check_bytes(name, [row[name]], limit)
    return text


def texts_of(row: Row, name: str, most: int, limit: int) -> list[str]:
    """A required list of at most max_texts texts, of max_prompt_bytes together."""
    given = row.get(name)
    values = given if isinstance(given, list) else [] if given is None else [given]
    if not values:
        raise InvalidInput(f"{name} is missing or empty")
    if len(values) > most:
        raise InvalidInput(f"{name} has {len(values)} entries, the limit is {most} (max_texts)")
    decoded = [decode(value, f"{name}[{at}]") for at, value in enumerate(values)]
    check_bytes(name, values, limit)
    return decoded


def check_bytes(what: str, values: Sequence[bytes | str], limit: int) -> None:
    """InvalidInput where they are longer than max_prompt_bytes together."""
    if (size := sum(map(len, values))) > limit:
        raise InvalidInput(f"{what} has {size} bytes, the limit is {limit} (max_prompt_bytes)")


def decode(value: Any, name: str) -> str:
    """UTF-8 of a BYTES value."""
    try:
        return value if isinstance(value, str) else str(value, "utf-8")
    except (UnicodeDecodeError, TypeError, ValueError):
        raise InvalidInput(f"{name} is not valid UTF-8") from None


def number(row: Row, name: str, default: int, low: int, high: int) -> int:
    """An optional whole number within bounds."""
    value = int(row.get(name, default))
    if not low <= value <= high:
        raise InvalidInput(f"{name} must be from {low} to {high}, not {value}")
    return value


def filled(rows: Sequence[Sequence[Any]], fill: Any, dtype: Any) -> Array:
    """Rows of different lengths as one array, the shorter ones filled at their end.  # [rows, longest]"""
    width = max(map(len, rows), default=0)
    array = np.full((len(rows), width), fill, dtype=dtype)
    for at, row in enumerate(rows):
        if len(row):
            array[at, : len(row)] = row
    return array


def texts(rows: Sequence[Sequence[str]]) -> Array:
    """Rows of strings as BYTES, filled with empty ones.  # [rows, longest]"""
    return filled([[text.encode() for text in row] for row in rows], b"", np.object_)
