"""Blame: what a log may say of a failure: its class and where it came from. It does not know who failed.

A message of code that is not ours may quote what it was given, a prompt among other things; so may the chain of causes.
Messages are logged at DEBUG alone.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

DEEPEST = 8
"""Frames of one exception that are named, the innermost ones."""
CAUSES = 4
"""Exceptions of one chain that are named."""


def tell(log: logging.Logger, what: str, error: BaseException) -> None:
    """`what` has failed with `error`; `what` must quote nobody."""
    log.error("%s: %s", what, places(error))
    log.debug(what, exc_info=error)


def places(error: BaseException) -> str:
    """Classes and places of an exception and its causes, in one line."""
    return "; after ".join(f"{type(one).__name__}{_frames(one)}" for one in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """As Python would print them, the last one first; an exception can come round again."""
    found: BaseException | None = error
    for _ in range(CAUSES):
        if found is None:
            return
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _frames(error: BaseException) -> str:
    """From the innermost outwards: file, line, function."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    named = [
        f"{'/'.join(Path(code.co_filename).parts[-2:])}:{line} {code.co_name}" for code, line in frames[-DEEPEST:][::-1]
    ]
    return f" at {' < '.join(named)}" if named else ""
