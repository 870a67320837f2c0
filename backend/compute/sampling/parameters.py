"""Parameters: how each row is drawn, as words that a CUDA graph can hold. It does not know logits.

One row is six 32-bit words: temperature, top_p and the logarithm of min_p as floats, top_k and the two keys of the
row's noise as integers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backend.compute.sampling.noise import row_keys
from backend.generation.plan import Sampling

WORDS = 6
FLOATS = 3
"""How many of them are floats; they come first."""


def parameters(sampling: Sampling, rows: int | None = None) -> NDArray[np.int32]:
    """int32 [rows, WORDS]; rows beyond the sampling's own are greedy."""
    count = len(sampling.temperature)
    words = np.zeros((count if rows is None else rows, WORDS), np.int32)
    lay_out(words, sampling)
    return words


def lay_out(words: NDArray[np.int32], sampling: Sampling) -> None:
    """Fill int32 [S, WORDS], S at least the sampling's rows; the rest becomes greedy."""
    count = len(sampling.temperature)
    words[count:] = 0
    floats, own = words[:count, :FLOATS].view(np.float32), words[:count]
    floats[:, 0], floats[:, 1] = sampling.temperature, sampling.top_p
    floats[:, 2] = -np.inf  # the logarithm of 0: it keeps all
    if sampling.min_p.any():
        np.log(sampling.min_p, out=floats[:, 2], where=sampling.min_p > 0)
    own[:, 3] = sampling.top_k
    own[:, 4], own[:, 5] = row_keys(sampling.seeds, sampling.counters)
