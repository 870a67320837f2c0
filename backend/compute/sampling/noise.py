"""The random numbers of the draws: functions of seed, counter and token id. They do not know logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backend.generation.plan import Longs

_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def row_keys(seeds: Longs, counters: Longs) -> NDArray[np.int32]:
    """The two hash keys of each row's random numbers [2, R], from seed [R] and counter [R].

    Twice the finaliser of SplitMix64 (Steele et al. 2014), on the host: R numbers only.
    """
    state = _mixed(_mixed(_words(seeds)) ^ _words(counters))
    return state.view(np.int32).reshape(-1, 2).T.copy()


def _words(values: Longs) -> NDArray[np.uint64]:
    return values.astype(np.int64, copy=False).view(np.uint64)


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Arrays wrap around without a warning."""
    state = state + _STEP
    state ^= state >> _SHIFTS[0]
    state *= _FACTORS[0]
    state ^= state >> _SHIFTS[1]
    state *= _FACTORS[1]
    state ^= state >> _SHIFTS[2]
    return state


def bits(key: Tensor, other: Tensor, ids: Tensor) -> Tensor:
    """31 random bits for each row and token id: int32 keys [G, 1], ids [V] -> int32 [G, V], never negative.

    A 32-bit finaliser of two multiplications (the constants of Wellons' "lowbias32"), whose second key enters between
    them, so that two rows never share their numbers in another order. Products wrap and shifts are
    made unsigned by a mask: torch has no unsigned arithmetic.
    """
    mixed = ids ^ key
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed *= 0x7FEB352D
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed ^= other
    mixed *= 0x846CA68B - (1 << 32)
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed &= 0x7FFFFFFF
    return mixed


def gumbel(key: Tensor, other: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [G, V]: -log(-log(1 - u)), u uniform.

    The largest noise comes from the smallest u, where floats are dense: tokens of probability 1e-8 are still drawn
    at their rate. u stays below 1, so that no noise is -inf and a single candidate is always chosen.
    """
    uniform = bits(key, other, ids).float().add_(0.5).mul_(-(2.0**-31)).clamp_(min=2.0**-24 - 1)
    return uniform.log1p_().neg_().log_().neg_()
