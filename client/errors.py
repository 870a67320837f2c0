"""What can go wrong, and what to do about it.

Error
├── InvalidInput        the request or its configuration is wrong; the message names the field or the limit
├── Overloaded          the server has too much in flight; send less at once, or later
├── DeadlineExceeded    a time limit passed: `timeout`, or `idle_timeout` between two chunks of a stream
├── Cancelled           the request was cancelled, here or at the server
├── Unavailable         no server, no ready model, or one that restarts; it may be there again soon
└── ServerError         a fault of the server; its log says more

It does not know how requests travel: `failure` turns a status name and a message into one of these.
"""

from __future__ import annotations

import re


class Error(Exception):
    """A failed request: what happened and what to do; `code` is the gRPC status, empty if it failed here."""

    advice = ""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed shortly, at this server or at another one."""
        return self.code == "UNAVAILABLE"


class InvalidInput(Error):
    """A value that cannot be served."""


class Overloaded(Error):
    """The server has too much in flight."""

    advice = "send fewer requests at once, or try again later"


class DeadlineExceeded(Error):
    """A time limit passed."""

    advice = "raise timeout=, or ask for fewer tokens"

    @property
    def retryable(self) -> bool:
        return False


class Cancelled(Error):
    """The request was cancelled."""

    advice = "send it again if its answer is still wanted"


class Unavailable(Error):
    """There is no server, or its model is not ready."""

    advice = "check the address, and `tritonspeed list` for the model's state; a restart may take a minute"


class ServerError(Error):
    """The server failed."""

    advice = "look at the server's log"


_BY_NAME: dict[str, type[Error]] = {
    "InvalidInput": InvalidInput,
    "Overloaded": Overloaded,
    "EngineDown": Unavailable,
    "DeadlineExceeded": DeadlineExceeded,
    "Cancelled": Cancelled,
    "LoadError": Unavailable,
    "ServingError": ServerError,
}
"""The backend's own class names, which open its messages."""

_CODE_BY_NAME = {
    "InvalidInput": "INVALID_ARGUMENT",
    "Overloaded": "UNAVAILABLE",
    "EngineDown": "UNAVAILABLE",
    "DeadlineExceeded": "UNAVAILABLE",
    "Cancelled": "CANCELLED",
    "LoadError": "UNAVAILABLE",
}
"""Their statuses: a stream's messages come without one."""

_BY_CODE: dict[str, type[Error]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "NOT_FOUND": InvalidInput,
    "ALREADY_EXISTS": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "UNAUTHENTICATED": InvalidInput,
    "PERMISSION_DENIED": InvalidInput,
    "RESOURCE_EXHAUSTED": Overloaded,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNAVAILABLE": Unavailable,
}

_ADVICE_BY_CODE = {
    "NOT_FOUND": "`tritonspeed list` shows the models that are there",
    "UNAUTHENTICATED": "give credentials with headers= or tls=",
    "PERMISSION_DENIED": "give the key of this protocol with headers=",
    "UNIMPLEMENTED": "is this address Triton's gRPC port?",
}

_TRITON = (
    (re.compile(r"unknown model: .* is not found"), "NOT_FOUND"),
    (re.compile(r"has no available versions|is not at ready state"), "UNAVAILABLE"),
    (re.compile(r"inference input|unexpected shape|expected \d+ inputs|batch[- ]size"), "INVALID_ARGUMENT"),
)
"""Triton's own refusals by their text, as streamed requests get them: all with the status INTERNAL."""

_QUEUE = {"Exceeds maximum queue size": "Overloaded", "Request timeout expired": "DeadlineExceeded"}
"""What Triton's dynamic batcher says, and the backend's name for it."""

_NOISE = re.compile(r"^\[request id: <id_unknown>\] | NOTE: .*", re.DOTALL)

_OPENING = re.compile(rf"(?:^|\bmessage: )({'|'.join(_BY_NAME)}): (.*)", re.DOTALL)
"""Triton puts "... message: " before what a Python model raised."""


def failure(code: str, message: str, address: str = "") -> Error:
    """The error for a gRPC status name and the server's message.

    The class that the backend names in the message wins over the status, since Triton has fewer statuses.
    """
    message = _NOISE.sub("", message).strip()
    if code == "INTERNAL":
        code = _true_code(message)
    kind, text = _classify(code, message)
    advice = "" if kind is InvalidInput and code not in _ADVICE_BY_CODE else _ADVICE_BY_CODE.get(code, kind.advice)
    where = f" [{address}]" if address else ""
    return kind((text or code) + where + (f"; {advice}" if advice else ""), code)


def _true_code(message: str) -> str:
    if named := _named(message):
        return _CODE_BY_NAME.get(named[0], "INTERNAL")
    return next((true for text, true in _TRITON if text.search(message)), "INTERNAL")


def _classify(code: str, message: str) -> tuple[type[Error], str]:
    if named := _named(message):
        return _BY_NAME[named[0]], named[1]
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in message:
        return InvalidInput, message
    return _BY_CODE.get(code, ServerError), message


def _named(message: str) -> tuple[str, str] | None:
    """The backend's name for an error, and the text, where a message tells."""
    if opening := _OPENING.search(message):
        return opening[1], opening[2]
    return next(((name, message) for text, name in _QUEUE.items() if text in message), None)
