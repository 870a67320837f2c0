"""What the codes of a packed weight mean, rounded nowhere."""

from __future__ import annotations

from torch import Tensor

from backend.compute.quantized.packed import Packed


def exact(weight: Packed) -> Tensor:
    """Scale and offset as they are stored, the rest float64: [N, K]."""
    codes, scale = weight._codes().double(), weight.scale.double()[..., None]
    grouped = codes / scale if weight.divides else codes * scale
    return (grouped if weight.offset is None else grouped + weight.offset.double()[..., None]).flatten(1)
