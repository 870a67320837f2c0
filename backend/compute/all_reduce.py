"""The sum of the ranks' parts of an update, and what follows it: by the process group, or by one kernel on NVLink.

The kernel (dense/peers.py) writes into the other GPUs' memory, which torch maps for it; NVLink multicast is not used,
and stays switched off. It is proved beside the group's own sum before it serves; where it cannot serve, the group does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from backend.compute.dense.base import ops
from backend.errors import one_line

Made = TypeVar("Made")

SWITCH = "TRITONSPEED_ONE_SHOT"
"""The environment variable that keeps the kernel out with 0."""
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
"""tensor_parallel.connect sets it."""
_HALVES = 2
"""Of an inbox, as dense/peers.py has it."""

PAIR, SENT = 32 << 20, 4 << 20
"""Bytes of the largest part: between two ranks nothing sends fewer bytes than this kernel does, so it has PAIR; of more
ranks each sends its part to all others, SENT in all, beyond which a ring sends less."""
_PATIENT, _PROVING = 2**31 - 1, 2**25
"""Looks at an inbox, about half a microsecond each, before a value is given up: the parent's watchdog comes first, but
for the proof."""
_TRIED = (1, 5, 1, 300, 300, 2, 64)
"""Tokens of the proof's sums."""
_CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Differences allowed, relative to the largest value."""


class Sums:
    """By the process group, NCCL or gloo. All ranks call the same methods in the same order, with the same shapes."""

    def __init__(self, device: torch.device) -> None:
        self._ops = ops(device.type)

    def total(self, part: Tensor) -> Tensor:
        """All ranks' parts, added up in place.  # [tokens, hidden]"""
        dist.all_reduce(part)
        return part

    def add(self, hidden: Tensor, part: Tensor) -> None:
        """Add all ranks' parts to hidden, in place."""
        hidden += self.total(part)

    def normed(self, hidden: Tensor | None, part: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of all ranks' parts, added to hidden, in place, where that is given."""
        total = self.total(part)
        if hidden is None:
            return self._ops.normed(total, None, weight, eps)
        return self._ops.normed(hidden, total, weight, eps)


class OneShot(Sums):
    """By one kernel each, where the parts fit its inboxes."""

    def __init__(self, inboxes: tuple[Tensor, ...], memory: Any, rank: int, width: int, dtype: torch.dtype) -> None:
        super().__init__(inboxes[rank].device)
        self._kernel = import_module("backend.compute.dense.peers")  # needs OpenAI Triton
        self._inboxes, self._rank, self._width, self._dtype = inboxes, rank, width, dtype
        self._turns = torch.zeros(self._kernel.PROGRAMS, dtype=torch.int32, device=inboxes[rank].device)
        self._memory = memory
        """What must outlive the inboxes."""
        self.patience = _PATIENT

    def fits(self, part: Tensor) -> bool:
        """Every rank says the same of the same shape."""
        return part.numel() <= self._inboxes[0].shape[-1] and part.shape[1] == self._width and part.dtype == self._dtype

    def total(self, part: Tensor) -> Tensor:
        return self._sum(part, None, None, 0.0) if self.fits(part) else super().total(part)

    def add(self, hidden: Tensor, part: Tensor) -> None:
        if self.fits(part):
            self._sum(part, hidden, None, 0.0)
        else:
            super().add(hidden, part)

    def normed(self, hidden: Tensor | None, part: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._sum(part, hidden, weight, eps) if self.fits(part) else super().normed(hidden, part, weight, eps)

    def _sum(self, part: Tensor, hidden: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
        found: Tensor = self._kernel.summed(
            part, hidden, weight, eps, self._inboxes, self._turns, self._rank, self.patience
        )
        return found


def sums(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Sums, str]:
    """For hidden states of this width, and in words how they are summed. All ranks call it together."""
    plain = Sums(device)
    if device.type != "cuda":
        return plain, ""
    if os.environ.get(SWITCH) == "0":
        return plain, f"NCCL sums between GPUs: {SWITCH} is 0"
    made, why = connected(width, dtype, device)
    if made is not None and not proved(made, plain, width, dtype, device):
        made, why = None, "the sums of the kernel for it differ"
    return (plain, f"NCCL sums between GPUs: {why}") if made is None else (made, "one kernel sums between GPUs")


def agreed(mine: bool, device: torch.device) -> bool:
    """Whether all ranks say so."""
    every = torch.tensor(int(mine), dtype=torch.int32, device=device)
    dist.all_reduce(every, dist.ReduceOp.MIN)
    return bool(every.item())


def agree(world: int, device: torch.device, could: bool) -> bool:
    """Whether all ranks could; graphs that talk to each other must be replayed by all or by none."""
    return could if world == 1 else agreed(could, device)


def room(world: int, itemsize: int) -> int:
    """Values of the largest part, in whole vectors."""
    return (PAIR if world == 2 else SENT // (world - 1)) // itemsize // 16 * 16


def connected(width: int, dtype: torch.dtype, device: torch.device) -> tuple[OneShot | None, str]:
    """With every rank's inbox mapped, on all ranks; or why not."""
    rank, world = dist.get_rank(), dist.get_world_size()
    values = torch.int32 if dtype.itemsize == 4 else torch.int16
    sizes = (_HALVES, world, room(world, dtype.itemsize))
    mine, why = _tried(lambda: _inbox(sizes, values, rank, device))
    if not agreed(mine is not None, device):  # here, not in the rendezvous, all wait for a rank that has none
        return None, why
    made, why = _tried(lambda: OneShot(*_mapped(mine, sizes, values), rank, width, dtype))
    return (made if agreed(made is not None, device) else None), why


def _tried(make: Callable[[], Made]) -> tuple[Made | None, str]:
    """What it makes, or why it does not; what another rank will not say."""
    try:
        return make(), "another rank cannot"
    except Exception as error:  # whatever torch and the driver say of a host without peer access
        return None, one_line(error)


def _inbox(sizes: tuple[int, ...], values: torch.dtype, rank: int, device: torch.device) -> Tensor:
    """This rank's, with nothing in it."""
    from torch.distributed import _symmetric_memory as symmetric

    if os.environ.get(NO_MULTICAST) != "1":
        raise RuntimeError(f"{NO_MULTICAST} is not 1")  # torch would set multicast up, which can hang the host's GPUs
    if not all(torch.cuda.can_device_access_peer(device, peer) for peer in range(sizes[1]) if peer != rank):
        raise RuntimeError("not every GPU can reach every other")
    mine = symmetric.empty(*sizes, dtype=values, device=device).fill_(torch.iinfo(values).min)
    torch.cuda.synchronize(device)
    return mine


def _mapped(mine: Any, sizes: tuple[int, ...], values: torch.dtype) -> tuple[tuple[Tensor, ...], Any]:
    """All ranks' inboxes, and what must live as long."""
    from torch.distributed import _symmetric_memory as symmetric

    everyone: Any = dist.group.WORLD
    handle: Any = symmetric.rendezvous(mine, everyone)
    return tuple(handle.get_buffer(peer, sizes, values) for peer in range(sizes[1])), (mine, handle)


def proved(made: OneShot, plain: Sums, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it gives what the group gives, on every rank the same bits, whatever the order of sizes."""
    made.patience = _PROVING
    agrees = all(_agree(made, plain, tokens, width, dtype, device) for tokens in _TRIED)
    made.patience = _PATIENT
    return agrees


def _agree(made: OneShot, plain: Sums, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight = (
        torch.randn(size, width, generator=generator).to(device, dtype) for size in (tokens, 1)
    )  # the same on all ranks
    generator.manual_seed(1000 + dist.get_rank())
    part = torch.randn(tokens, width, generator=generator).to(device, dtype)
    part[:, ::7] = -0.0
    want, found = hidden.clone(), hidden.clone()
    pairs = [
        (plain.normed(want, part.clone(), weight[0], 1e-5), made.normed(found, part.clone(), weight[0], 1e-5)),
        (want, found),
        (plain.total(part.clone()), made.total(part.clone())),
    ]
    same = _same(pairs[-1][1])
    return agreed(same and all(_close(*pair) for pair in pairs), device)


def _close(want: Tensor, found: Tensor) -> bool:
    error = (want.float() - found.float()).abs().max()
    return bool(error <= _CLOSE[want.dtype] * want.float().abs().max())


def _same(found: Tensor) -> bool:
    """Whether it is the same on all ranks."""
    least, most = found.float().clone(), found.float().clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return bool(torch.equal(least, most))
