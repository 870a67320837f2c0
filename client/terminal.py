"""Images in a terminal that can show them: kitty's and iTerm2's escape sequences. It does not know whose images."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable
from typing import Protocol

_CHUNK = 4096
"""Bytes of one of kitty's sequences at most."""


class Stream(Protocol):
    """Where output goes."""

    def isatty(self) -> bool: ...


def painter(stream: Stream) -> Callable[[bytes], str] | None:
    """What writes a PNG as this terminal shows it; None where it cannot, or is no terminal.

    A terminal says by its environment what it is; inside tmux and screen that is not what draws.
    """
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if not stream.isatty() or term.startswith(("screen", "tmux")):
        return None
    if term in ("xterm-kitty", "xterm-ghostty"):
        return kitty
    return iterm if program in ("iTerm.app", "WezTerm") else None


def kitty(png: bytes) -> str:
    """In pieces, of which each but the last says that more follow."""
    text = b64encode(png).decode()
    pieces = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    heads = ["a=T,f=100,", *[""] * (len(pieces) - 1)]
    lasts = [1] * (len(pieces) - 1) + [0]
    return "".join(
        f"\033_G{head}m={more};{piece}\033\\" for head, more, piece in zip(heads, lasts, pieces, strict=True)
    )


def iterm(png: bytes) -> str:
    """In one piece."""
    return f"\033]1337;File=inline=1;size={len(png)}:{b64encode(png).decode()}\a"
