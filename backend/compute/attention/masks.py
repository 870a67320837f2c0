"""Watches which mask transformers itself would apply to each layer; it does not know how paged attention applies one.

paged() derives causality and the window from its arguments. A family whose window, chunks or bidirectional parts live
only in the mask would then be computed wrongly without a sign: the probe compares, and loading fails instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from backend.compute.attention.paged import NAME, paged, register

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers.masking_utils: (batch, head, query position, key position) -> whether it is seen."""

PROBE = "paged_probe"


@contextmanager
def watching(model: Any) -> Iterator[dict[int, MaskFunction | None]]:
    """Layer -> the mask function that transformers' eager attention would be given, filled by forwards in the block."""
    masks: dict[int, MaskFunction | None] = {}

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        seen = callable(attention_mask) and not isinstance(attention_mask, Tensor)
        masks[getattr(module, "layer_idx", -1)] = attention_mask if seen else None
        return paged(module, query, key, value, None if seen else attention_mask, **kwargs)

    register()
    AttentionInterface.register(PROBE, attend)
    AttentionMaskInterface.register(PROBE, lambda *args, mask_function, **kwargs: mask_function)
    model.set_attn_implementation(PROBE)
    try:
        yield masks
    finally:
        model.set_attn_implementation(NAME)


def disagreement(config: Any, layer: int, window: int, mask: MaskFunction | None) -> str | None:
    """Why a causal mask with this window (0: none) is not the layer's own; None where it is."""
    if mask is not None:
        return None if _is_causal(mask, window) else f"layer {layer} has a mask other than {_name(window)}"
    stated = _stated(config, layer)
    return None if stated == window else f"layer {layer} uses {_name(window)}, its configuration says {_name(stated)}"


def _is_causal(mask: MaskFunction, window: int) -> bool:
    """Whether the mask is causal with this window, tried at positions around its borders and far from them."""
    borders = sorted({0, 1, 2, 5, window, window + 1, abs(window - 1), 2 * window + 3, 1000, 8192, 100_003})
    try:
        return all(
            bool(mask(_at(0), _at(0), _at(row), _at(column)))
            == (column <= row and (not window or column > row - window))
            for row in borders
            for column in borders
        )
    except (IndexError, RuntimeError):  # it looks up positions of the probe's own two tokens
        return False


def _at(position: int) -> Tensor:
    return torch.tensor(position)


def _stated(config: Any, layer: int) -> int:
    kinds = getattr(config, "layer_types", None)
    if (kinds is not None and kinds[layer] == "full_attention") or getattr(config, "use_sliding_window", True) is False:
        return 0
    return getattr(config, "sliding_window", None) or 0


def _name(window: int) -> str:
    return f"a window of {window}" if window else "the whole context"
