"""Which Scheme a model's parameters ask for, and whether it fits a layer on any number of ranks."""

from __future__ import annotations

from backend.compute.quantized.packed import Scheme
from backend.config import EngineConfig
from backend.errors import LoadError

GROUPS = {("int4", True): 32, ("int4", False): 32, ("int8", False): 64}
"""Columns of a group where none are asked for, by kind and whether symmetric; all of a row for the others."""


def scheme_of(config: EngineConfig) -> Scheme | None:
    """None: weights stay as they are."""
    kind, symmetric = config.quantization, config.symmetric
    if not kind:
        return None
    return Scheme(kind, config.quantization_group or GROUPS.get((kind, symmetric), 0), symmetric)


def check_width(name: str, scheme: Scheme, width: int, start: int, stop: int) -> None:
    """LoadError unless the groups of a layer's whole rows are those of this rank's columns too."""
    size = scheme.group or (2 if scheme.bits == 4 else 1)
    if width % size:
        raise LoadError(f"{name} takes {width} columns, which groups of {size} do not divide (quantization_group)")
    if start % size or stop % size:
        raise LoadError(
            f"{name}: this rank has columns {start} to {stop}, which cut a group of {size} (quantization_group)"
        )
