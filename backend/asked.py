"""Asked: what one caller asked, and the way back. What is behind it is known to `triton.Asked` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray


class Asked(Protocol):
    """A request of one answer; exactly one of `answer` and `fail` is used, once."""

    @property
    def request_id(self) -> str: ...

    @property
    def trace(self) -> str:
        """The server's traceparent, empty where it is not traced; asked for only where there is a collector."""

    def parameters(self) -> dict[str, Any]:
        """Its time limit in µs as `timeout`, among others; before `rows`."""

    def rows(self) -> list[dict[str, Any]]:
        """Its inputs by name, row by row; InvalidInput where they cannot be read."""

    def cancelled(self) -> bool:
        """Whether the caller has gone; not to be asked once it is answered."""

    def answer(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """The only response, or the last one."""

    def fail(self, error: Exception) -> None: ...


class Streaming(Asked, Protocol):
    """A request of any number of answers: `send` as often as there is news, then one of `answer`, `end` and `fail`."""

    def send(self, outputs: Mapping[str, NDArray[Any]]) -> None: ...

    def end(self) -> None: ...
