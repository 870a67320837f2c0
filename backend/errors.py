"""What can go wrong. Each class is one Triton status; its name opens the message that a client sees.

ServingError                INTERNAL      a bug, with the exception's class
├── InvalidInput            INVALID_ARG   the caller's fault; names the field or the limit
├── Overloaded              UNAVAILABLE   too much in flight; try again later
├── EngineDown              UNAVAILABLE   ranks are down or restarting; try again later
├── DeadlineExceeded        UNAVAILABLE   the request's own time limit passed (Triton has no nearer status)
├── Cancelled               CANCELLED     the caller went away
└── LoadError               UNAVAILABLE   the model cannot be served as configured; one line says why

It does not know Triton's API: `backend.triton` turns `code` into a TritonError.
"""


class ServingError(Exception):
    """A failure with a Triton status; `str()` is for people, `wire()` for the client."""

    code = "INTERNAL"

    def wire(self) -> str:
        """The message as sent: "<class>: <text>", which the client parses back into its own class."""
        return f"{type(self).__name__}: {self}"


class InvalidInput(ServingError):
    """A value that cannot be served."""

    code = "INVALID_ARG"


class Overloaded(ServingError):
    """More requests in flight than configured."""

    code = "UNAVAILABLE"


class EngineDown(ServingError):
    """The ranks died, hang or are restarting."""

    code = "UNAVAILABLE"


class DeadlineExceeded(ServingError):
    """The request's deadline passed, queued or running."""

    code = "UNAVAILABLE"


class Cancelled(ServingError):
    """The caller cancelled or went away."""

    code = "CANCELLED"


class LoadError(ServingError):
    """The model cannot be loaded as configured."""

    code = "UNAVAILABLE"


def require(holds: bool, message: str) -> None:
    """LoadError with this message unless it holds."""
    if not holds:
        raise LoadError(message)


def serving(error: BaseException) -> ServingError:
    """Any failure as one that has a status: what is not ours is named by its class, in one line."""
    if isinstance(error, ServingError):
        return error
    return ServingError(f"{type(error).__name__}: {one_line(error, 500)}")


def one_line(error: BaseException, most: int = 200) -> str:
    """What it says, at most so many characters of it, or its class where it says nothing: never empty."""
    return " ".join(str(error).split())[:most] or type(error).__name__
