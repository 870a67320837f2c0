"""What the trainings share: one thread, one seed, a progress bar, bfloat16 where the processor has it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

T = TypeVar("T")


def settle(seed: int) -> None:
    """One thread: with two, a busy neighbour on the other core makes training several times slower."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def bar(steps: int, what: str) -> Iterator[int]:
    """Counts the steps, and draws them on a terminal."""
    yield from tqdm(range(steps), desc=what, unit="step", disable=None, leave=False)


def mixed() -> AbstractContextManager[Any]:
    """bfloat16 products where the processor multiplies them itself; elsewhere they would be slower, not faster."""
    if _has_bfloat16(Path("/proc/cpuinfo")):
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def _has_bfloat16(cpuinfo: Path) -> bool:
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


def draw(values: Sequence[T]) -> list[T]:
    """The same values in an order that the seed decides."""
    return random.sample(values, len(values))


def alike(rows: Sequence[T], size: int, length: Callable[[T], int]) -> list[list[T]]:
    """Batches of rows of about one length, which saves filling."""
    ordered = sorted(rows, key=length)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def falling(optimizer: torch.optim.Optimizer, steps: int, warm: int) -> LRScheduler:
    """The learning rate: up to its full height in `warm` steps, then down to nothing in a straight line."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )


def step(loss: Tensor, weights: Iterable[Tensor], optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
    """One update of the weights, held back where the gradient is steep."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    schedule.step()


def save_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
