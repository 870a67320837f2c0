"""Limits and Attempts: how long a request may take and how often it may be tried. They do not know how it is sent."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from sys import float_info
from time import monotonic

from client.errors import DeadlineExceeded, Error, InvalidInput

FIRST_DELAY = 0.1
LONGEST_DELAY = 2.0


@dataclass(frozen=True)
class Limits:
    """Seconds; and how often a request that no server could take is tried again."""

    timeout: float | None = 600.0
    """From the call to the last byte, retries included; None: only `idle_timeout` binds."""
    idle_timeout: float = 60.0
    """Between two chunks of a stream."""
    retries: int = 2
    """Tries after every address has been tried once."""

    def __post_init__(self) -> None:
        for name in ("timeout", "idle_timeout"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= float_info.max):
                raise InvalidInput(f"{name} must be a positive number of seconds, not {value!r}")
        if not isinstance(self.retries, int) or self.retries < 0:
            raise InvalidInput(f"retries must not be negative, not {self.retries!r}")


@dataclass
class Attempts:
    """The tries of one request over its addresses: all of them at once, then round again with growing pauses."""

    addresses: int
    limits: Limits
    start: int = 0
    """The address that goes first."""
    made: int = 0
    begun: float = field(default_factory=monotonic)

    @property
    def address(self) -> int:
        """Number of the address to try now."""
        return (self.start + self.made) % self.addresses

    def remaining(self) -> float | None:
        """Seconds left of `timeout`; raises DeadlineExceeded when there are none."""
        if self.limits.timeout is None:
            return None
        left = self.begun + self.limits.timeout - monotonic()
        if left <= 0:
            raise self.too_late()
        return left

    def wait_limit(self, first: bool) -> float | None:
        """Seconds that one wait may take: the first answer may be long in coming, in a queue say, the next ones not."""
        return None if first and self.limits.timeout is not None else self.limits.idle_timeout

    def after(self, error: Error) -> float:
        """Seconds to pause before the next try; raises the error where another try is not allowed."""
        self.made += 1
        if not error.retryable or self.made >= self.addresses + self.limits.retries:
            raise error
        if self.made < self.addresses:
            return 0.0
        delay = min(FIRST_DELAY * 2.0 ** (self.made - self.addresses), LONGEST_DELAY)
        delay *= random.uniform(0.5, 1.0)  # jitter, so that clients do not come back together
        left = self.remaining()
        if left is not None and left <= delay:
            raise error
        return delay

    def too_late(self) -> DeadlineExceeded:
        """The error of a request whose `timeout` has passed."""
        return DeadlineExceeded(f"no complete answer within {self.limits.timeout:g} s; {DeadlineExceeded.advice}")

    def too_idle(self, address: str) -> DeadlineExceeded:
        """The error of a stream whose next chunk did not come."""
        seconds = f"{self.limits.idle_timeout:g} s"
        return DeadlineExceeded(f"nothing came from {address} for {seconds}; raise idle_timeout= if it is only slow")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
