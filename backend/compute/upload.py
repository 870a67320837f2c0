"""Arrays on their way to a device that is busy, and back from it; it does not know what they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device. It is complete when the device's current stream gets there; nothing waits for it.

    On CUDA it goes by way of pinned memory, from where the device fetches it by itself: a copy from other memory may
    wait for all that the stream holds. torch keeps the pinned memory until its copies are done.
    """
    host = torch.from_numpy(np.array(array, order="C"))
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def refill(place: Tensor, lay_out: Callable[[NDArray[Any]], None]) -> None:
    """Lay the values of a tensor on the device out anew; nothing waits for them, here or there."""
    host = torch.empty(place.shape, dtype=place.dtype, pin_memory=place.device.type == "cuda")
    lay_out(host.numpy())
    place.copy_(host, non_blocking=True)


def download(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """A CUDA device's tensors on their way into host memory; calling the result waits until they are there."""
    copies = [torch.empty_like(each, device="cpu", pin_memory=True).copy_(each, non_blocking=True) for each in tensors]
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> list[Tensor]:
        copied.synchronize()
        return copies

    return arrived
