"""What this GPU reaches here and now: a large copy, and a large matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from measuring.floors import Ceiling


def measured() -> Ceiling:
    """On the current CUDA device; takes 8 GiB for a moment."""
    ceiling = Ceiling(_copy(), _product())
    torch.cuda.empty_cache()
    return ceiling


def _copy(size: int = 1 << 32) -> float:
    source = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source))


def _product(size: int = 8192) -> float:
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: left @ right)


def seconds(work: Callable[[], object], times: int = 20, warm: int = 3) -> float:
    """Mean time of one call on the device, from CUDA events."""
    for _ in range(warm):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / times
