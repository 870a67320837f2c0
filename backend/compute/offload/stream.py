"""Stream: the layers of a model on their way through a few slots of the device, round and round.

It does not know where they come from. A layer's tensors are views of one slot for good, so nothing is hung anew; what a
slot holds just now is known here. In whatever order layers are called each computes on its own weights: another order
than the usual one only waits longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from backend.compute.offload.transfers import Arrived, Transfers

NAN = 0xFF
"""A byte of which numbers of any floating point type are none."""


@dataclass
class Slot:
    """Device memory that some layers share."""

    memory: Tensor
    holds: int = -1
    """Place in the round of the layer in it, or on its way."""
    arrived: Arrived = field(default=lambda: None)

    def forget(self) -> None:
        self.arrived()
        self.memory.fill_(NAN)
        self.holds = -1


class Stream:
    """A round of layers through slots: that at place p goes into slot p % slots."""

    def __init__(self, layers: list[nn.Module], slots: list[Tensor], transfers: Transfers) -> None:
        """The number of layers is a multiple of the slots'; a layer's place is its region's number in the store."""
        assert len(layers) % len(slots) == 0, (len(layers), len(slots))
        self._transfers, self._count, self._bare = transfers, len(layers), False
        self._slots = [Slot(memory) for memory in slots]
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, place))
            layer.register_forward_hook(partial(self._leave, place))
        self._fetch(range(len(slots)))

    def _enter(self, place: int, *_: Any) -> None:
        """Wait for a layer; if it is not even on its way, send for it and for those behind it."""
        slot = self._slots[place % len(self._slots)]
        if slot.holds != place:
            self._fetch(range(place, place + (1 if self._bare else len(self._slots))))
        slot.arrived()

    def _leave(self, place: int, *_: Any) -> None:
        """Fill the slot with the next layer that belongs there, after the last the first."""
        if self._bare:
            self._slots[place % len(self._slots)].forget()
        else:
            self._fetch([place + len(self._slots)])

    def _fetch(self, places: Iterable[int]) -> None:
        for place in (place % self._count for place in places):
            slot = self._slots[place % len(self._slots)]
            if slot.holds != place:
                slot.holds, slot.arrived = place, self._transfers.start(place, slot.memory)

    def round(self) -> None:
        """All layers once through their slots, without computing; returns when the host need wait for none."""
        for place in range(self._count):
            slot = self._slots[place % len(self._slots)]
            slot.arrived()
            slot.holds, slot.arrived = place, self._transfers.start(place, slot.memory)
        for slot in self._slots:
            slot.arrived()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Meanwhile a slot holds a layer only while that computes: reading its weights out of turn gives no numbers."""
        for slot in self._slots:
            slot.forget()
        self._bare = True
        try:
            yield
        finally:
            self._bare = False
