"""Stream: the mailbox from the engine's thread to one caller. It does not know what a token or a response is for.

One thread puts, one takes; a deque's append and popleft are atomic, so there is no lock. A late reader gets everything
since its last look as one delta per sequence, which is what bounds both memory and the number of responses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from backend.errors import ServingError


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


class Stream:
    """The deltas of one request's `sequences` sequences, in order."""

    def __init__(self, sequences: int, notify: Callable[[], None]) -> None:
        self.sequences = sequences
        self._unfinished = sequences
        self._mail: deque[Delta | ServingError] = deque()
        self._notify = notify

    def put(self, delta: Delta) -> None:
        """Engine's thread: add news; `ring` tells the reader."""
        self._mail.append(delta)

    def fail(self, error: ServingError) -> None:
        """Engine's thread: end the whole request with `error`."""
        self._mail.append(error)
        self.ring()

    def ring(self) -> None:
        """Engine's thread: wake the reader."""
        self._notify()

    @property
    def done(self) -> bool:
        """Whether every sequence has finished and been taken."""
        return self._unfinished == 0

    def take(self) -> list[Delta]:
        """All news since the last call, one delta a sequence, by index; then, alone, raises what ended the request."""
        news: dict[int, Delta] = {}
        while self._mail:
            mail = self._mail.popleft()
            if isinstance(mail, ServingError):
                if not news:
                    raise mail
                self._mail.appendleft(mail)
                self._notify()  # the reader's next look
                break
            if known := news.get(mail.index):
                known.extend(mail)
            else:
                news[mail.index] = mail
            self._unfinished -= bool(mail.finish_reason)
        return [news[index] for index in sorted(news)]
