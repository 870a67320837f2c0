"""From options to ranks that are ready, with the seconds that each part of the start took."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

from backend.config import EngineConfig
from backend.devices import resolved
from backend.generation.capacity import share
from backend.ranks.group import RankGroup, environment

WORKER = "measuring.step_worker:StepWorker"
LIMIT = 900.0
"""Seconds for one question to the ranks."""
BESIDE = 32
"""Sequences that decode beside a prefill."""


def config_of(options: argparse.Namespace, folder: str, batches: list[int]) -> EngineConfig:
    """As the engine would have it, for the largest batch."""
    beside = BESIDE + _prompts(options.prompt) if "prefill" in options.parts else 1
    given = {
        "model": folder, "tensor_parallel": str(options.tensor_parallel), "dtype": options.dtype,
        "device": options.device, "max_sequences": str(max([*batches, beside])),
    }  # fmt: skip
    if kind := options.quantization:
        given |= {"quantization": kind, "quantization_group": str(options.group if kind != "fp8" else 0)}
    return resolved(EngineConfig.from_parameters({**given, **dict(pair.split("=", 1) for pair in options.set)}))


def _prompts(length: int) -> int:
    """How many hold a slot while they stream through full steps of 2,048 tokens, one ahead."""
    return 2 * (2048 // length + 2)


def started(config: EngineConfig) -> tuple[Any, int]:
    """Ranks that have loaded, allocated and warmed up, each told with its seconds; and the number of KV blocks."""
    clock = _Clock()
    ranks = clock.told("load", lambda: _loaded(config))
    capacities = clock.told("capacity", lambda: ranks.call("capacity", timeout=LIMIT))
    blocks, longest = share(config, capacities)
    clock.told("allocate", lambda: ranks.call("allocate", blocks, longest, timeout=LIMIT))
    clock.told("warm-up and graphs", lambda: ranks.call("warm_up", timeout=LIMIT))
    print(f"start-up: {clock}; {blocks} KV blocks, sequences up to {longest} tokens", flush=True)
    return ranks, blocks


def _loaded(config: EngineConfig) -> Any:
    if config.tensor_parallel == 1:
        os.environ.update(environment(config, 0))
        import torch

        from measuring.step_worker import Alone

        torch.set_num_threads(config.threads)
        return Alone(config, lambda line: None)
    group = RankGroup(config, WORKER, report=lambda line: None)
    group.start()
    return group


class _Clock:
    """Names and seconds."""

    def __init__(self) -> None:
        self._told: list[str] = []

    def told(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self._told.append(f"{name} {time.perf_counter() - start:.1f} s")
        return result

    def __str__(self) -> str:
        return ", ".join(self._told)
