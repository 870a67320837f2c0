"""Paged attention as OpenAI-Triton kernels, for CUDA; they know strides and block tables, not models.

Chunks of one token go to the decode kernel, which is bound by reading the cache, or, where a step is a few of them, to
the split one, which is bound by latency; longer chunks go to the prefill kernel, which is bound by arithmetic. Nothing
here reads a device value on the host, and a decode step's launches depend on shapes alone: CUDA graphs may hold them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.compute.attention.base import Rule
from backend.compute.attention.decode import decode
from backend.compute.attention.prefill import prefill
from backend.compute.attention.split import split, splits
from backend.compute.attention.step import Step
from backend.compute.attention.tiles import dense, jit, stored
from backend.errors import LoadError

WIDEST_HEAD = 256


def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, step: Step, rule: Rule) -> Tensor:
    """[heads, tokens, dim] and twice [kv heads, tokens, dim] -> [tokens, heads, dim]."""
    _write(step.cache.layers[layer], key, value, step.kv_slots)
    return read(query.transpose(0, 1), layer, step, rule)


def read(query: Tensor, layer: int, step: Step, rule: Rule, output: Tensor | None = None) -> Tensor:
    """[tokens, heads, dim], whose keys and values are in the cache already -> [tokens, heads, dim], there if given."""
    if query.shape[2] > WIDEST_HEAD or query.shape[2] % 8:
        raise LoadError(f"head size {query.shape[2]}: the CUDA kernel takes multiples of 8 up to {WIDEST_HEAD}")
    kv, query = step.cache.layers[layer], dense(query)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device) if output is None else output
    single, several = (True, False) if step.decode else step.once("chunk sizes", lambda: _sizes(step))
    if several:
        prefill(output, query, kv, step, rule)
    if count := splits(step, kv.shape[3]):
        split(output, query, kv, step, rule, count)
    elif single:
        decode(output, query, kv, step, rule)
    return output


def _sizes(step: Step) -> tuple[bool, bool]:
    """Whether there are chunks of one token, and of several."""
    counts = np.diff(step.host_starts)
    return bool((counts == 1).any()), bool((counts > 1).any())


def _write(kv: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    heads, tokens, dim = key.shape
    key, value = dense(key), dense(value)
    _write_kernel[(tokens,)](
        kv, key, value, slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(heads * dim),
    )  # fmt: skip


@jit
def _write_kernel(
    kv, key, value, slots, key_head, key_token, value_head, value_token,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program copies one token's keys and values to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < HEADS * DIM
    head, dim = offsets // DIM, offsets % DIM
    base = kv + slot * (2 * HEADS * DIM) + offsets
    k = tl.load(key + token * key_token + head * key_head + dim, mask=inside, other=0.0)
    v = tl.load(value + token * value_token + head * value_head + dim, mask=inside, other=0.0)
    tl.store(base, stored(k, kv), mask=inside)
    tl.store(base + HEADS * DIM, stored(v, kv), mask=inside)
