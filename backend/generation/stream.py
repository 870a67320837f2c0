"""Stream: the mailbox from the engine's thread to one caller. It does not know what a token or a response is for.

One thread puts, one takes; a deque's append and popleft are atomic, so there is no lock. A late reader gets everything
since its last look as one delta per sequence, which is what bounds both memory and the number of responses. Tokens
become text when they are taken, on the reader's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from backend.errors import ServingError

if TYPE_CHECKING:
    from backend.generation.completion import Completion


@dataclass(slots=True)
class Delta:
    """What one sequence of a request has gained."""

    index: int
    """Prompt number x n + sample number."""
    text: str
    token_ids: list[int]
    finish_reason: str = ""
    cumulative_logprob: float = 0.0
    """Of all tokens so far; 0 unless asked for."""
    logprobs: list[float] | None = None
    """Of token_ids; only if asked for."""

    def extend(self, later: Delta) -> None:
        """Become this delta and the one after it."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.finish_reason = later.finish_reason
        self.cumulative_logprob = later.cumulative_logprob
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs


class News(NamedTuple):
    """One accepted token, as the engine's thread leaves it."""

    completion: Completion
    token_id: int
    finish_reason: str
    """Of the sequence, if this token was its last."""
    logprob: float | None
    text: str | None
    """What the token adds, where the engine had to look (for stop strings)."""


class Stream:
    """The news of one request's `sequences` sequences, in order."""

    def __init__(self, sequences: int, notify: Callable[[bool], None]) -> None:
        """`notify` is told whether a sequence, or all, ended with the news."""
        self.arrived = time.monotonic()
        self.begun = self.first = self.last = 0.0  # of its sequences' first step and first token, and of the last one
        self.sequences = sequences
        self._unfinished = sequences
        self._mail: deque[News | ServingError] = deque()
        self._notify = notify

    def put(self, news: News) -> None:
        """Engine's thread: add news; `ring` tells the reader."""
        self._mail.append(news)

    def fail(self, error: ServingError) -> None:
        """Any thread: end the whole request with `error`."""
        self._mail.append(error)
        self.ring(ended=True)

    def ring(self, ended: bool) -> None:
        """Engine's thread: tell the reader."""
        self._notify(ended)

    @property
    def waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self._mail)

    @property
    def done(self) -> bool:
        """Whether every sequence has finished and been taken."""
        return self._unfinished == 0

    def take(self) -> list[Delta]:
        """All news since the last call, one delta a sequence, by index; then, alone, raises what ended the request."""
        gained: dict[int, list[News]] = {}
        while self._mail:
            mail = self._mail.popleft()
            if isinstance(mail, ServingError):
                if not gained:
                    raise mail
                self._mail.appendleft(mail)
                self._notify(True)  # the reader's next look
                break
            gained.setdefault(mail.completion.index, []).append(mail)
            self._unfinished -= bool(mail.finish_reason)
        return [news[0].completion.delta(news) for _, news in sorted(gained.items())]
