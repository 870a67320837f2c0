"""Rotary embedding, per-head norms and the write to the KV cache, as one OpenAI-Triton kernel over the merged QKV.

A program takes some heads of one token, queries, keys and values alike; what differs is where a head is stored.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.compute.attention.tiles import stored

HEADS_PER_PROGRAM = 4
"""Elements for one warp: four heads of 128 are 16 a thread."""


def roped(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
    heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """See base.Ops."""
    tokens, kv_heads, dim = len(qkv), kv.shape[3], kv.shape[4]
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and kv.is_contiguous()
    assert qkv.shape[1] == (heads + 2 * kv_heads) * dim
    output = torch.empty(tokens, heads, dim, dtype=qkv.dtype, device=qkv.device)
    query_norm, key_norm = norms or (None, None)
    _rope_kernel[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS_PER_PROGRAM))](
        output, kv, qkv, cos, sin, slots, query_norm, key_norm, eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, TURNING=cos.shape[1], BLOCK=triton.next_power_of_2(dim),
        TILE=HEADS_PER_PROGRAM, num_warps=HEADS_PER_PROGRAM // 4 * (1 if dim <= 128 else 2),
    )  # fmt: skip
    return output


@triton.jit
def _rope_kernel(
    output, kv, qkv, cos, sin, slots, query_norm, key_norm, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TURNING: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    dim = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (dim < DIM)
    turns = dim < TURNING
    partner = tl.where(turns, tl.where(dim < TURNING // 2, dim + TURNING // 2, dim - TURNING // 2), dim)

    row = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * DIM
    plain = tl.load(row + dim, mask=inside, other=0.0)
    x = plain.to(tl.float32)
    across = tl.load(row + partner, mask=inside & turns, other=0.0).to(tl.float32)
    if query_norm is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x *= scale * _gains(query_norm, key_norm, dim, head, HEADS, DIM)
        across *= scale * _gains(query_norm, key_norm, partner, head, HEADS, DIM)
    c = tl.load(cos + token * TURNING + dim, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + token * TURNING + dim, mask=turns, other=0.0).to(tl.float32)
    turned = x * c + tl.where(dim < TURNING // 2, -across, across) * s

    tl.store(
        output + (token * HEADS + head) * DIM + dim, turned.to(output.dtype.element_ty), mask=inside & (head < HEADS)
    )
    # A slot holds its keys' heads, then its values': the order in which they follow the queries here.
    slot = kv + tl.load(slots + token) * (2 * KV_HEADS * DIM) + (head - HEADS) * DIM + dim
    cached = tl.where(head < HEADS + KV_HEADS, turned, plain.to(tl.float32))
    tl.store(slot, stored(cached, kv), mask=inside & (head >= HEADS))


@triton.jit
def _gains(query_norm, key_norm, dim, head, HEADS: tl.constexpr, DIM: tl.constexpr):
    """The norms' weights for these dims of these heads; those of values are never used."""
    own = head < HEADS
    query = tl.load(query_norm + dim, mask=own & (dim < DIM), other=0.0).to(tl.float32)
    key = tl.load(key_norm + dim, mask=(head >= HEADS) & (dim < DIM), other=0.0).to(tl.float32)
    return tl.where(own, query, key)
