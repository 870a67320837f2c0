"""Which devices this machine has, without torch. It does not know what runs on them."""

from __future__ import annotations

import os
from dataclasses import replace

from backend.config import EngineConfig


def gpu_memory() -> list[int]:
    """Total bytes of each visible NVIDIA GPU; empty where there is none, or no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or no device: all mean none
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        totals = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return totals if visible is None else [totals[int(i)] for i in visible.split(",") if i.strip().isdigit()]


def resolved(config: EngineConfig) -> EngineConfig:
    """The configuration with what `auto` and 0 mean on this machine, where that needs no model."""
    device = config.device if config.device != "auto" else "cuda" if gpu_memory() else "cpu"
    cuda = device == "cuda"
    return replace(
        config,
        device=device,
        step_tokens=config.step_tokens or (2048 if cuda else 512),
        kv_cache_fraction=config.kv_cache_fraction or (0.9 if cuda else 0.1),
        threads=config.threads or (1 if cuda else max(1, len(os.sched_getaffinity(0)) // config.tensor_parallel)),
    )
