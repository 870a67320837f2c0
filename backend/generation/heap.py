"""Heap: sequences in order of a key, any of which may leave. It does not know what they wait for."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from backend.generation.sequence import Sequence


class Heap:
    """Sequences by a key that never changes; those discarded stay inside until they surface or outnumber the others."""

    def __init__(self, key: Callable[[Sequence], tuple[float, ...]]) -> None:
        self._key = key
        self._members: set[Sequence] = set()
        self._entries: list[tuple[tuple[float, ...], Sequence]] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._members

    def first(self) -> Sequence | None:
        """Return the member with the smallest key, if any."""
        while self._entries and self._entries[0][1] not in self._members:
            heapq.heappop(self._entries)
        return self._entries[0][1] if self._entries else None

    def push(self, seq: Sequence) -> None:
        self._members.add(seq)
        heapq.heappush(self._entries, (self._key(seq), seq))

    def discard(self, seq: Sequence) -> None:
        self._members.discard(seq)
        if len(self._entries) > 2 * len(self._members) + 64:
            self._entries = [(self._key(member), member) for member in self._members]
            heapq.heapify(self._entries)
