"""Requests and responses as numpy arrays by name. It does not know which names a task has."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient import utils

from client.errors import InvalidInput, ServerError
from client.transport import Request, Response

Tensors = Mapping[str, NDArray[Any]]

BINARY = frozenset({"image"})
"""Tensors of bytes that are no text: images' files."""


def encode(model: str, tensors: Tensors) -> Request:
    """One request; arrays of dtype object hold bytes and become BYTES."""
    request = Request(model_name=model)
    for name, array in tensors.items():
        datatype = utils.np_to_triton_dtype(array.dtype)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(_bytes(array) if datatype == "BYTES" else array.tobytes())
    return request


def decode(response: Response) -> dict[str, NDArray[Any]]:
    """The output tensors by name; BYTES become str, those of BINARY stay bytes (dtype object)."""
    if len(response.raw_output_contents) != len(response.outputs):
        raise ServerError("the server's answer holds no raw tensors; is it a Triton server?")
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    with readable():
        return {output.name: _array(output, raw).reshape(tuple(output.shape)) for output, raw in pairs}


@contextmanager
def readable() -> Iterator[None]:
    """ServerError where an answer is none that such a model gives; also as a decorator."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OverflowError, OSError, SyntaxError, struct.error) as error:
        raise ServerError(f"the server's answer cannot be read: {' '.join(str(error).split()):.200}") from None


def text(value: str, name: str) -> bytes:
    """UTF-8 of a string; InvalidInput where it has lone surrogates."""
    if not isinstance(value, str):
        raise InvalidInput(f"{name} must be a string, not {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{name} is not valid Unicode: lone surrogate at character {error.start}") from None


def strings(*values: bytes) -> NDArray[np.object_]:
    """A row of BYTES."""
    return np.array([values], dtype=np.object_)  # [1, k]


def _bytes(array: NDArray[Any]) -> bytes:
    packed: bytes = utils.serialize_byte_tensor(array).item() if array.size else b""
    return packed


def _array(output: Any, raw: bytes) -> NDArray[Any]:
    if output.datatype == "BYTES":
        items: NDArray[Any] = utils.deserialize_bytes_tensor(raw)
        return items if output.name in BINARY else np.array([item.decode() for item in items], dtype=np.object_)
    dtype = utils.triton_to_np_dtype(output.datatype)
    if dtype is None:
        raise ServerError(
            f"the server's answer has a tensor of type {output.datatype!r}, which this client does not know"
        )
    return np.frombuffer(raw, dtype=dtype)
