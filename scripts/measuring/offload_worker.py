"""OffloadWorker: a StepWorker whose weights are drawn where they will lie; it measures their way to the device."""

from __future__ import annotations

import time
from typing import Any

import torch

from backend.compute import load
from backend.compute.quantized.layer import packed_weights
from backend.compute.quantized.packed import Packed
from measuring.ceilings import seconds
from measuring.step_worker import StepWorker

BYTES = 1 << 30


class OffloadWorker(StepWorker):
    """Reads no checkpoint: `load` fills by `drawn`."""

    def __init__(self, *born: Any) -> None:
        usual, load.fill = load.fill, drawn
        try:
            super().__init__(*born)
        finally:
            load.fill = usual

    @property
    def moved(self) -> int:
        """Bytes in a step."""
        assert self._offload is not None
        return self._offload.moved

    def link(self) -> float:
        """Bytes a second: one large copy from locked host memory, measured apart from all of ours; on CPU in memory."""
        cuda = self._device.type == "cuda"
        source = torch.ones(BYTES, dtype=torch.uint8, pin_memory=cuda)
        target = torch.empty_like(source, device=self._device)
        if cuda:
            return BYTES / seconds(lambda: target.copy_(source, non_blocking=True))
        return BYTES / _clocked(lambda: target.copy_(source))

    def alone(self) -> float:
        """Bytes a second of all layers on their way to the device while nothing computes: from disk, the disk's."""
        assert self._offload is not None
        return self.moved / _clocked(self._offload.round)


def _clocked(work: Any) -> float:
    """Seconds of the fastest of several."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)


def drawn(model: Any, wanted: Any, parts: Any, reader: Any, progress: Any = lambda share: None) -> None:
    """In place of load.fill: ones for norms, N(0, 0.02) for the rest, drawn on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chance = torch.Generator(device).manual_seed(0)
    places = {**model.state_dict(), **packed_weights(model)}
    for number, (name, place) in enumerate(places.items()):
        value = torch.ones(tuple(place.shape), dtype=place.dtype, device=device)
        if "norm" not in name:
            value.normal_(0, 0.02, generator=chance)
        if isinstance(place, Packed):
            place.fill(value)
        else:
            place.copy_(value)
        progress((number + 1) / len(places))
