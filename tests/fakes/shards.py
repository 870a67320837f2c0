"""Loads checkpoints on CPU ranks of their own and hands back what each rank computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import torch
from rank_processes import Ranks


@dataclass(frozen=True)
class Case:
    """One checkpoint to load, and what to compute with it."""

    folder: Path
    dtype: torch.dtype = torch.float32
    merge: bool | None = True
    unguarded: bool = False
    """Whether the table of families is passed over, so that only what the loader sees for itself can refuse."""
    attention: str = "eager"
    measure: bool = False
    """Whether to measure memory."""
    inputs: torch.Tensor | None = None


@dataclass
class Result:
    """What one rank got from one case."""

    error: str = ""
    logits: torch.Tensor | None = None
    shares: list[float] = field(default_factory=list)
    """Progress as told."""
    facts: dict[str, Any] = field(default_factory=dict)


def start(world: int, cases: list[Case]) -> Ranks:
    """`world` ranks that load `cases` one after the other; each gives a Result a case."""
    return Ranks(world, _attempts, cases)


def _attempts(rank: int, world: int, cases: list[Case]) -> list[Result]:
    return [_attempt(case, rank, world) for case in cases]


def _attempt(case: Case, rank: int, world: int) -> Result:
    from backend.errors import LoadError

    result = Result()
    try:
        _compute(case, rank, world, result)
    except LoadError as error:
        result.error = str(error)
    return result


def _compute(case: Case, rank: int, world: int, result: Result) -> None:
    from backend.compute import load as module
    from backend.config import EngineConfig

    def load() -> Any:
        config, device = EngineConfig(model=str(case.folder)), torch.device("cpu")
        return module.load(
            config, rank, world, device, case.dtype, result.shares.append, attention=case.attention, merge=case.merge
        )

    if case.measure:
        model, result.facts["peak"] = _watched(load)
    else:
        with patch.object(module, "check_family") if case.unguarded else patch.object(module, "_never", create=True):
            model = load()
    _note(model, result)
    if not case.measure and case.attention == "eager":
        with torch.inference_mode():
            tokens = families.inputs() if case.inputs is None else case.inputs
            result.logits = model(tokens, use_cache=False).logits


def _note(model: Any, result: Result) -> None:
    from backend.compute.fused import MergedPart

    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in model.state_dict().values()}
    result.facts |= {
        "bytes": sum(storage.nbytes() for storage in storages.values()),
        "tied": head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr(),
        "merged": sum(isinstance(module, MergedPart) for module in model.modules()),
        "dtypes": {str(value.dtype) for value in model.parameters()},
        "names": list(model.state_dict()),
        "training": model.training,
        "attention": model.config._attn_implementation,
    }


def _watched(load: Callable[[], Any]) -> tuple[Any, int]:
    """Load and find by how many bytes this process's own memory grew at most; mapped files are the kernel's."""
    before, highest, done = _own(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, _own())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = load()
    finally:
        done.set()
        watcher.join()
    return model, highest - before


def _own() -> int:
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * 4096
