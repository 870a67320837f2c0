"""Delivery: one request's news on their way to its caller. It knows neither Triton nor which thread it is on.

A response costs as much with eight tokens as with one, so there is a least interval between two of them: the first goes
at once, each later one carries all text since, and an end waits for nothing. News that come too early go when they are
due, not with the next step's: a step with prompts may take twice as long as the one before it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from math import inf

from backend.asked import Asked, Streaming
from backend.blame import tell
from backend.errors import Cancelled
from backend.generation.request import Request
from backend.generation.stream import Delta, Stream
from backend.journal import Entry

log = logging.getLogger("tritonspeed")


def refuse(asked: Asked, error: Exception) -> None:
    """Fail it. It does not raise: where the way back is broken too, nobody is left to tell."""
    try:
        asked.fail(error)
    except Exception as second:
        tell(log, f"a request that failed with {type(error).__name__} could not be answered", second)


class Delivery:
    """Whoever holds its turn, and nobody else, sends: it is in the outbox, or with a sender. Once over it keeps it."""

    stream: Stream
    """Set before the first turn."""

    def __init__(
        self,
        request: Request,
        asked: Streaming,
        outbox: Callable[[Delivery], None],
        later: Callable[[float, Delivery], None],
        entry: Entry | None = None,
    ) -> None:
        """`outbox` takes those that have something to send, `later` those that shall `wake` at some time."""
        self._request, self._asked, self._outbox, self._later = request, asked, outbox, later
        self._entry = entry
        self._turn = threading.Lock()
        self._turn.acquire()
        self._asking = False  # Triton must not be asked about a request that is over: so only with the turn
        self._ended = False  # a sequence has, or all have, since the last look
        self._due = 0.0 if request.options.stream else inf  # before that, only an end is worth a look
        self._news = 0.0  # when the last news came that was worth one
        self._waits = False  # to be woken; set twice by a race, it is woken twice

    def notify(self, ended: bool) -> None:
        """Engine's thread: there is news."""
        if ended:
            self._ended = True
        now = time.monotonic()
        if ended or now >= self._due:
            self._news = now
            self._queue()
        else:
            self._wait()

    def wake(self) -> None:
        """Any thread, at the time that was asked for: have news sent that came too early."""
        self._waits = False  # first, so that none which come now are left behind
        if self._overdue():
            self._news = time.monotonic()
            self._queue()
        elif self.stream.waiting:  # others went meanwhile
            self._wait()

    def look(self) -> None:
        """Any thread, now and then: have a sender ask whether the caller has gone, and send what waits for no step."""
        self._asking = True
        self._queue()

    def send(self, interval: float) -> bool:
        """A sender's thread: all the news in one response. The next is for news that come at least `interval` seconds
        after these came: had it to wait so long after these were sent, a sender that is late once would make the
        caller miss a step's token. But half of it is the sender's rest.

        Returns whether the request is over.
        """
        self._ended = False
        try:
            over = self._send(interval)
        except Exception as error:
            self._fail(error)
            return True
        if over:
            self._close()
        else:
            self.release()
        return over

    def release(self) -> None:
        """Give the turn back, and take it again for news that came meanwhile."""
        self._turn.release()
        if self._overdue():
            self._queue()
        elif self.stream.waiting:
            self._wait()

    def _send(self, interval: float) -> bool:
        if self._asking:
            self._asking = False
            if self._asked.cancelled():
                raise Cancelled("the caller went away")
        deltas = self._taken()
        outputs, over = self._request.answer(deltas) if deltas else None, self.stream.done
        if over:
            self._asked.answer(outputs) if outputs else self._asked.end()
        elif outputs:
            self._asked.send(outputs)
            self._due = max(self._news + interval, time.monotonic() + interval / 2)
        return over

    def _taken(self) -> list[Delta]:
        deltas = self.stream.take()
        if entry := self._entry:
            entry.add("tokens_out", sum(len(delta.token_ids) for delta in deltas))
            entry.reasons.update(delta.finish_reason for delta in deltas if delta.finish_reason)
        return deltas

    def _fail(self, error: Exception) -> None:
        refuse(self._asked, error)
        self._close(error)

    def _close(self, error: Exception | None = None) -> None:
        """The request's line in the journal, if there is one."""
        if self._entry:
            stream = self.stream
            self._entry.begun, self._entry.first, self._entry.last = stream.begun, stream.first, stream.last
            self._entry.close(error)

    def _overdue(self) -> bool:
        return self.stream.waiting and (self._ended or time.monotonic() >= self._due)

    def _wait(self) -> None:
        if not self._waits and self._due < inf:
            self._waits = True
            self._later(self._due, self)

    def _queue(self) -> None:
        if self._turn.acquire(blocking=False):
            self._outbox(self)
