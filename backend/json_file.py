"""Reading the JSON files of a model's folder. It does not know what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backend.errors import LoadError


def content(path: Path) -> Any:
    """A file's content. FileNotFoundError where there is none; LoadError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: it is not valid JSON: {error}") from None


def required(path: Path, kind: str) -> dict[str, Any]:
    """The object in a file that makes its folder a `kind`; LoadError where it is missing or holds something else."""
    try:
        return _object(path, content(path))
    except FileNotFoundError:
        raise LoadError(f"{path} is missing: not a {kind}") from None


def optional(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is no such file."""
    try:
        there = path.is_file()
    except OSError as error:  # a name that no file can have
        raise LoadError(f"{path!s:.200} cannot be read: {error.strerror}") from None
    return _object(path, content(path)) if there else {}


@contextmanager
def values_of(what: str) -> Iterator[None]:
    """LoadError where values of a file are of no type that can be used there; also as a decorator."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise LoadError(f"{what} holds a value of the wrong kind: {error!s:.200}") from None


def _object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LoadError(f"{path} must hold a JSON object")
    return value
