"""Kernels that start while the one before them ends: Hopper's programmatic dependent launch, and why it is right.

Where a kernel waits for the one before in full, the device's memory stands still for 1 to 1.5 µs. A kernel launched
with `early` may start once each program of the kernel before it has called `begin` or has ended, and takes its place
beside the last of them. Its results are the same, because:

1. Each of its programs calls `begin`, which waits until the kernel before has ended and all that it wrote can be seen.
2. Before `begin` no program reads or writes a value. It may ask for weights to come to L2 (`fetched`): that gives no
   value, and as every write goes to L2, what is read there later is never out of date.
3. So whoever is past `begin` knows that the kernel before has ended, which itself was past its own, or, launched in the
   ordinary way, had not started before everything before it had ended. Step by step, all earlier kernels have ended:
   their results are there, and memory that they still read is not written. That holds only if every program of every
   kernel launched with `early` calls `begin`; none may return before.

An ordinary launch (cuBLAS, NCCL, attention, copies, what waits for events) starts after all before it has ended, those
included that have let it go early. A captured CUDA graph keeps both kinds of order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import ctypes
import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ON = os.environ.get("TRITONSPEED_PDL") != "0"
CAPABILITY = 9
"""Major version of the first devices that can."""
DRIVER = 12030
"""CUDA 12.3, the first whose graphs can."""
SECTOR = tl.constexpr(32)
"""Bytes that memory moves at once."""
FIRST = tl.constexpr(16 * 132)
"""Programs that may start beside the kernel before: as many as an H200 takes, four warps each."""


def early(x: Tensor) -> dict[str, bool]:
    """How to launch a kernel that calls `begin`, on the device of x; nothing where that cannot start early."""
    return {"EARLY": True, "launch_pdl": True} if ON and x.is_cuda and _able(x.device) else {}


@lru_cache
def _able(device: torch.device) -> bool:
    driver = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    return driver.value >= DRIVER and torch.cuda.get_device_capability(device)[0] >= CAPABILITY


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the kernel behind start, and wait for the one before: ahead of all that reads or writes values."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetched(rows, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr):
    """Before `begin`: ask for COLUMNS columns from `start` of some rows of weights, given by where they begin [n]."""
    if EARLY:  # noqa: SIM102 (known to the compiler, the next is not)
        if tl.program_id(0) < FIRST:
            STEP: tl.constexpr = SECTOR * 8 // rows.dtype.element_ty.primitive_bitwidth
            column = tl.minimum(start + tl.arange(0, COLUMNS // STEP) * STEP, WIDTH - 1)
            at = (rows[:, None] + column[None, :]).to(tl.int64)
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [at], tl.int32, is_pure=False, pack=1)
