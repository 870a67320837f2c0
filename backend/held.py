"""Held: which of a model's weights a device holds at once when its layers come one after the other (`offload`).

It decides from sizes alone; compute/offload does it, and knows exactly.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from math import ceil

from backend.config import EngineConfig

SLOTS = 2
"""Layers on the device at once: one computes, one is on its way; with more the link is no busier."""

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


def split(sizes: Iterable[tuple[str, float]], config: EngineConfig) -> tuple[int, int]:
    """Bytes of weights, by tensor name, on the device, and of those that come from elsewhere each step."""
    tensors = list(sizes)
    total = ceil(sum(size for _, size in tensors))
    layers = _layers(tensors) if config.offload else []
    if len(layers) <= SLOTS:
        return total, 0
    fixed, largest = total - sum(layers), max(layers)
    if total <= config.device_memory << 20:
        return total, 0
    staying = residents(len(layers), largest, ceil(fixed), config.device_memory << 20)
    return ceil(fixed + (SLOTS + staying) * largest), ceil((len(layers) - staying) * largest)


def residents(layers: int, largest: float, fixed: float, cap: int) -> int:
    """How many of so many layers stay on the device beside `fixed` bytes: as few as can be, or as fit below the cap.

    The others fill the slots in turn, so their number is a multiple of the slots'.
    """
    least = fixed + (SLOTS + layers % SLOTS) * largest
    more = int(max(0, cap - least) // (SLOTS * largest)) * SLOTS
    return min(layers % SLOTS + more, layers - SLOTS)


def _layers(tensors: list[tuple[str, float]]) -> list[float]:
    """The sizes of the layers in the list of layers that holds most."""
    lists: dict[str, Counter[str]] = {}
    for name, size in tensors:
        if found := _LAYER.match(name):
            lists.setdefault(found[1], Counter())[found[2]] += size  # type: ignore[assignment]
    return list(max(lists.values(), key=lambda each: sum(each.values())).values()) if lists else []
