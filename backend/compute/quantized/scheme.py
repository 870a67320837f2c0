"""Which Scheme a model's parameters ask for, and whether it fits a layer on any number of ranks."""

from __future__ import annotations

from backend.compute.quantized.packed import Scheme
from backend.config import EngineConfig
from backend.errors import LoadError


def scheme_of(config: EngineConfig) -> Scheme | None:
    """None: weights stay as they are."""
    return Scheme(config.quantization, config.group, config.symmetric) if config.quantization else None


def check_width(name: str, scheme: Scheme, width: int, start: int, stop: int) -> None:
    """LoadError unless the groups of a layer's whole rows are those of this rank's columns too."""
    size = scheme.group or (2 if scheme.bits == 4 else 1)
    key = "group_size of quantization_config" if scheme.stored else "quantization_group"
    if width % size:
        raise LoadError(f"{name} takes {width} columns, which groups of {size} do not divide ({key})")
    if start % size or stop % size:
        raise LoadError(f"{name}: this rank has columns {start} to {stop}, which cut a group of {size} ({key})")
