"""The sum over GPUs of one host, with the addition and the RMS norm that follow it, as one OpenAI-Triton kernel.

Every rank stores its part into all others' inboxes and adds up what it finds in its own: one way over NVLink, where a
ring goes two. No flag tells that a value has arrived: an inbox is full of a bit pattern that no rank sends (-0.0, for
which 0.0 goes), and whoever has read a value puts the pattern back. (The idea is known as Lamport's queue.)

An inbox has two halves, taken in turns. A rank that stores into a half has finished the kernel before this one, for
which it needed values that its peers stored after they had emptied that half: so nothing is overwritten unread.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128
"""At most so many wait for their peers, which must all be on the device at once; an H200 takes 132 and more."""


def summed(
    part: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    eps: float,
    inboxes: tuple[Tensor, ...],
    turns: Tensor,
    rank: int,
    patience: int,
) -> Tensor:
    """All ranks' parts [T, H], added in the order of ranks in float32: every rank gets the same bits.

    With `hidden` [T, H] the sum is added to it, in place; with `weight` [H] the RMS norm of what came of that is the
    result, else the sum itself, rounded, in the part's place. inboxes: all ranks', of integers as wide as the parts'
    values, [2, ranks, room], full of the least value (-0.0) at first; turns int32 [PROGRAMS], this rank's, zeros at
    first. All ranks call it in the same order with the same shapes, whose width H never changes. After `patience` looks
    at an inbox a value that has not come is taken for -0.0.
    """
    assert part.is_contiguous() and (hidden is None or hidden.is_contiguous())
    tokens, width = part.shape
    assert part.numel() <= inboxes[rank].shape[-1] and part.itemsize == inboxes[rank].itemsize
    output = part if weight is None else torch.empty_like(part)
    block = triton.next_power_of_2(width)
    _sum_kernel[(min(tokens, PROGRAMS),)](
        output, part, hidden, weight, eps, inboxes, turns, tokens, patience,
        ROOM=inboxes[rank].shape[-1], RANK=rank, WORLD=len(inboxes), EMPTY=torch.iinfo(inboxes[rank].dtype).min,
        WIDTH=width, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["tokens", "patience"])
def _sum_kernel(
    output, part, hidden, weight, eps, inboxes, turns, tokens, patience,
    ROOM: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, EMPTY: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    program = tl.program_id(0)
    turn = tl.load(turns + program)
    half = turn * WORLD * ROOM
    for token in range(program, tokens, tl.num_programs(0)):
        own = _sendable(tl.load(part + token * WIDTH + at, mask=inside, other=0.0), inboxes[RANK], EMPTY)
        for step in tl.static_range(1, WORLD):  # not all to the same rank at first
            tl.store(inboxes[(RANK + step) % WORLD] + half + RANK * ROOM + token * WIDTH + at, own, mask=inside)
    for token in range(program, tokens, tl.num_programs(0)):
        here = token * WIDTH + at
        x = tl.zeros([BLOCK], tl.float32)
        if hidden is not None:  # asked for before the wait, as is the weight
            x = tl.load(hidden + here, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        own = _sendable(tl.load(part + here, mask=inside, other=0.0), inboxes[RANK], EMPTY)
        total = _total(own, part, inboxes[RANK] + half + here, inside, patience, ROOM, RANK, WORLD, EMPTY)
        x = (x + total).to(part.dtype.element_ty)
        if hidden is not None:
            tl.store(hidden + here, x, mask=inside)
        if weight is not None:
            x = _scaled(x, gain, eps, WIDTH)
        if hidden is None or weight is not None:
            tl.store(output + here, x, mask=inside)
    tl.debug_barrier()  # all threads have read the turn
    tl.store(turns + program, 1 - turn)


@triton.jit
def _sendable(value, inbox, EMPTY: tl.constexpr):
    """Its bits, but for the one pattern that means that nothing has come."""
    bits = value.to(inbox.dtype.element_ty, bitcast=True)
    return tl.where(bits == EMPTY, 0, bits)


@triton.jit
def _total(
    own, part, place, inside, patience, ROOM: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr, EMPTY: tl.constexpr
):
    """float32, of this rank's bits and of those at its place in the inbox; `part` has the type that they stand for."""
    total = tl.zeros(own.shape, tl.float32)
    for peer in tl.static_range(WORLD):
        found = own
        if peer != RANK:
            found = _taken(place + peer * ROOM, inside, patience, EMPTY)
        total += found.to(part.dtype.element_ty, bitcast=True).to(tl.float32)
    return total


@triton.jit
def _taken(place, inside, patience, EMPTY: tl.constexpr):
    """What has come, once all of it has; the place is empty again."""
    found = tl.load(place, mask=inside, other=0, volatile=True)
    looks = 1
    while (tl.max((found == EMPTY).to(tl.int32), 0) != 0) & (looks < patience):
        found = tl.load(place, mask=inside, other=0, volatile=True)
        looks += 1
    tl.store(place, tl.full(found.shape, EMPTY, found.dtype), mask=inside)
    return found


@triton.jit
def _scaled(x, gain, eps, WIDTH: tl.constexpr):
    """The RMS norm of x, rounded as x."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    return (wide * scale * gain).to(x.dtype)
