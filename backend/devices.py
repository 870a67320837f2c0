"""Which devices this machine has, without torch. It does not know what runs on them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from backend.config import EngineConfig

KV_CACHE_FRACTION = {"cuda": 0.9, "cpu": 0.1}
"""Share of the free memory that the KV cache takes unless the configuration says otherwise."""

STEP_TOKENS = {"cuda": (2048, 8192), "cpu": (512, 1024)}
"""Budget of a step unless the configuration says otherwise; and with offload, where more cost hardly more."""
MICRO_BATCH_TOKENS = {"cuda": 16384, "cpu": 512}
"""Token budget of a task's micro-batch. On a CPU what the layers make of it should stay in its caches."""


def free_gpu_memory() -> list[int]:
    """Free bytes of each GPU that CUDA_VISIBLE_DEVICES shows, in its order; empty where there is none, or no driver."""
    try:
        import pynvml
    except ImportError:
        return []
    free: list[int] = []
    try:
        pynvml.nvmlInit()
        every = range(pynvml.nvmlDeviceGetCount())
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, every))).split(","):
            free.append(int(pynvml.nvmlDeviceGetMemoryInfo(_gpu(name.strip())).free))
    except pynvml.NVMLError:  # as for CUDA, a name that is no device ends the list
        pass
    return free


def _gpu(name: str) -> Any:
    """Its handle, by index or by UUID (as Kubernetes names devices)."""
    import pynvml

    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def free_host_memory() -> int:
    """Bytes that may still be taken: the machine's, or the control group's where that is less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return available


def cpu_vendor() -> str:
    """GenuineIntel, AuthenticAMD ..., as the processor calls itself; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def gib(size: int) -> str:
    """Bytes, for people."""
    return f"{size / (1 << 30):.2f} GiB"


def resolved(config: EngineConfig) -> EngineConfig:
    """The configuration with what `auto` and 0 mean on this machine, where that needs no model."""
    device = config.device if config.device != "auto" else "cuda" if free_gpu_memory() else "cpu"
    cuda = device == "cuda"
    return replace(
        config,
        device=device,
        step_tokens=config.step_tokens or STEP_TOKENS[device][bool(config.offload)],
        cuda_graphs=config.cuda_graphs and not config.offload,
        kv_cache_fraction=config.kv_cache_fraction or KV_CACHE_FRACTION[device],
        threads=config.threads or (1 if cuda else max(1, len(os.sched_getaffinity(0)) // config.tensor_parallel)),
    )
