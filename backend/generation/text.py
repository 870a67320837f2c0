"""Text: one sequence's tokens become text as they come, up to its stop strings. It does not know who samples or reads.

What has been given joins to exactly the tokenizer's decode of all tokens, cut before the first stop string.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from backend.generation.tokenizer import Tokenizer, clean_up

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer writes bytes that are no character, or not yet."""

WINDOW, TAIL = 24, 8
"""Tokens decoded at a time: past WINDOW, all but the last TAIL are let go. Any four bytes bring a UTF-8 decoder back
into step, so a tail of eight tokens decodes as it would behind all the others."""


class Text:
    """What the engine holds for each sequence: token ids in, text out; `stopped` once a stop string has come."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer), StopStrings(stop)

    @property
    def stopped(self) -> bool:
        return self._stop.stopped

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain after these tokens and was not before; may be empty."""
        return self._stop.push(self._detokenizer.push(token_ids))[0]

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        return self._stop.push(self._detokenizer.flush())[0] + self._stop.flush()


class Detokenizer:
    """Tokens to text, whole characters only.

    The last few tokens are decoded anew with each push, and what is new in their text is given: no token can be
    decoded alone, since decoders look at what stands before it (a first token loses its space) and characters span
    tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = ""  # of the window's text
        self._uncleaned = ""  # decoded, waiting for what follows it

    def push(self, token_ids: Iterable[int]) -> str:
        """The new text, less a last character that may still change."""
        silent = self._tokenizer.silent
        self._window += [token_id for token_id in token_ids if not silent(token_id)]
        if not self._window or self._window[-1] in self._tokenizer.byte_ids:
            return ""  # one bad byte in a run of byte tokens changes all of its text
        return self._cleaned(self._new())

    def flush(self) -> str:
        """The rest of the text."""
        rest = self._uncleaned + self._new(whole=True)
        self._uncleaned = ""
        return clean_up(rest) if self._tokenizer.cleans_up else rest

    def _new(self, whole: bool = False) -> str:
        text = self._tokenizer.decode_raw(self._window)
        held = 0 if whole else len(text) - len(text.removesuffix(UNFINISHED))
        new = text[len(self._given) : len(text) - held]
        self._given = text[: len(text) - held]
        if len(self._window) > WINDOW:
            self._shrink(held)
        return new

    def _shrink(self, held: int) -> None:
        """Let go of all but a tail whose text is not empty: a decoder may strip the first space of its text."""
        tail = self._tokenizer.decode_raw(self._window[-TAIL:])
        if len(tail) > held:
            self._window, self._given = self._window[-TAIL:], tail[: len(tail) - held]

    def _cleaned(self, text: str) -> str:
        """For tokenizers that clean up: all before the last place that no pattern spans."""
        if not self._tokenizer.cleans_up:
            return text
        text = self._uncleaned + text
        cut = max((found.start() for found in _BORDER.finditer(text)), default=0)
        self._uncleaned = text[cut:]
        return clean_up(text[:cut])


_BORDER = re.compile(r"(?<=[^\W_]) (?=[^'])")  # a space after a letter or digit, which no apostrophe follows


class StopStrings:
    """Text up to the stop string that is complete first (the longest of those): it and all after it are dropped.

    However the text is cut into pieces, the result is the same, and no part of a stop string is ever given.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        """No stop string may be empty."""
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain to stand before any stop string, and whether one has come."""
        if self.stopped or not self._stop:
            return ("" if self.stopped else text), self.stopped
        text = self._held + text
        if found := [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]], True
        cut = min(_opening(text, stop) for stop in self._stop)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back, now that nothing follows it."""
        held, self._held = self._held, ""
        return held


def _opening(text: str, stop: str) -> int:
    """Where the longest end of the text that opens the stop string begins."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)
