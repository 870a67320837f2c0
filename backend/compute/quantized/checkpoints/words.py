"""Codes out of int32 words, the first in the lowest bits, in the order in which Packed keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word AWQ puts each of eight neighbours."""


def numbers(words: Tensor, bits: int, interleaved: bool = False) -> Tensor:
    """int32 [..., n] -> uint8 [..., n * 32 / bits]"""
    codes = _bytes(words)  # [..., n, 4]
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    if interleaved:
        codes = codes[..., AWQ]
    return codes.flatten(-2)


def in_rows(words: Tensor, bits: int) -> Tensor:
    """Words along the columns, int32 [N, n] -> codes of Packed."""
    codes = _bytes(words).flatten(1)
    return _swapped(codes) if bits == 4 else codes


def in_columns(words: Tensor, bits: int) -> Tensor:
    """Words down the columns, int32 [n, N] -> codes of Packed."""
    codes = _bytes(words).permute(1, 0, 2).flatten(1)
    return _swapped(codes) if bits == 4 else codes


def paired(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> uint8 [N, K / 2], the even column in the high half."""
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def _swapped(codes: Tensor) -> Tensor:
    return codes << 4 | codes >> 4


def _bytes(words: Tensor) -> Tensor:
    """uint8 [..., 4], the lowest first."""
    return words.contiguous().view(torch.uint8).view(*words.shape, 4)
