"""Transfers: copying a stored layer into a slot on the device while others compute; not which goes where."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from backend.compute.offload.stores import Store, host_memory

Arrived = Callable[[], object]
"""Lets what is computed next wait for a transfer."""


class Transfers(Protocol):
    """Transfers into slots, one after the other in the order of `start`."""

    def slot(self, nbytes: int) -> Tensor:
        """Memory on the device that transfers may fill.  # uint8 [nbytes]"""

    def start(self, index: int, slot: Tensor) -> Arrived:
        """Copy region `index` there, once all that has been computed so far no longer needs it."""


class ToHost:
    """For a CPU: a thread copies or reads. Computing is over when `start` is called."""

    def __init__(self, store: Store) -> None:
        self._store, self._thread = store, ThreadPoolExecutor(1, thread_name_prefix="offload")

    def slot(self, nbytes: int) -> Tensor:
        return host_memory(nbytes, torch.device("cpu"))

    def start(self, index: int, slot: Tensor) -> Arrived:
        return self._thread.submit(self._store.read, index, slot).result


class ToCuda:
    """For a GPU: a stream of its own copies whole layers from locked memory; what lies on disk is read there first."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._device = store, device
        self._stream = torch.cuda.Stream(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        self._thread = ThreadPoolExecutor(1, "offload", torch.cuda.set_device, (index,))
        self._stages: list[tuple[Tensor, Any]] = []

    def slot(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def start(self, index: int, slot: Tensor) -> Arrived:
        free = torch.cuda.current_stream().record_event()
        memory = self._store.whole(index)
        if memory is not None:
            return self._copied(memory, slot, free)
        read: Future[Arrived] = self._thread.submit(self._read, index, slot, free)

        def arrived() -> None:
            read.result()()

        return arrived

    def _copied(self, memory: Tensor, slot: Tensor, free: Any) -> Arrived:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            slot[: len(memory)].copy_(memory, non_blocking=True)
            done = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)

    def _read(self, index: int, slot: Tensor, free: Any) -> Arrived:
        """On the thread: into one stage, while the other one is being copied to the device."""
        stage, copied = self._stages.pop(0) if len(self._stages) > 1 else (host_memory(len(slot), self._device), None)
        if copied is not None:
            copied.synchronize()
        self._store.read(index, stage)
        arrived = self._copied(stage[: len(slot)], slot, free)
        self._stages.append((stage, self._stream.record_event()))
        return arrived


def transfers(store: Store, device: torch.device) -> Transfers:
    return ToCuda(store, device) if device.type == "cuda" else ToHost(store)
