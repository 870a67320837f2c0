"""Decoders of tiny models, one after the other in the same ranks, and schedules played on them as the engine would."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from backend.compute import decoder, tensor_parallel
from backend.compute.tensor_parallel import connect
from backend.config import EngineConfig
from backend.generation.blocks import BlockPool
from backend.generation.capacity import Capacity
from backend.generation.plan import Plan, Sampled, pack
from backend.generation.scheduler import Scheduler
from backend.generation.sequence import Sequence
from backend.ranks.rank import Birth, Deferred


class Decoders:
    """A rank's worker that makes a Decoder for any folder when it is asked to.

    The ranks meet in `config.model`, for the group's own folder is gone once they have started, and DeepSpeed makes
    another torch group for each model.
    """

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        self._birth, self._progress = birth, progress
        torch.set_num_threads(1)
        connect(birth.rank, birth.world, torch.device("cpu"), birth.config.model)

    def open(self, config: EngineConfig, num_blocks: int) -> Capacity:
        """Load, tell the capacity, allocate."""
        with patch.object(tensor_parallel, "connect"):  # once a process
            self.decoder = decoder.Decoder(replace(self._birth, config=config), self._progress)
        capacity = self.decoder.capacity()
        self.decoder.allocate(num_blocks, config.max_model_len or capacity.max_model_len)
        return capacity

    def warm_up(self) -> None:
        self.decoder.warm_up()

    def step(self, plan: Plan) -> Sampled | Deferred:
        return self.decoder.step(plan)


def local(lines: list[str] | None = None) -> Decoders:
    """A rank alone in this process."""
    birth = Birth("", EngineConfig(model=""), 0, 1, "", 0)
    return Decoders(birth, lambda line: None if lines is None else lines.append(line))


def settings(folder: Path, **changes: Any) -> EngineConfig:
    """Of a small decoder on CPU, as `devices.resolved` would leave them."""
    usual = {"device": "cpu", "threads": 1, "step_tokens": 64, "kv_cache_fraction": 0.01, "max_sequences": 8}
    return EngineConfig(**{"model": str(folder), "block_size": 4, **usual, **changes})


def play(
    step: Callable[[Plan], Sampled],
    sequences: list[Sequence],
    config: EngineConfig,
    num_blocks: int,
    seed: int = 0,
    depth: int = 1,
) -> tuple[Scheduler, list[list[float]]]:
    """Run sequences that come at random to their end, `depth` steps ahead; log-probabilities as far as asked for.

    `step` computes at once here, and its answers are committed late: what the plans are made from is known as late.
    """
    rng = random.Random(seed)
    pool = BlockPool(num_blocks, config.block_size)
    scheduler = Scheduler(pool, config.max_sequences, config.step_tokens)
    coming, sent = list(sequences)[::-1], deque[tuple[list[Any], Sampled]]()
    logprobs: dict[Sequence, list[float]] = {seq: [] for seq in sequences}
    while coming or sent or not scheduler.idle:
        for _ in range(min(len(coming), rng.choice([0, 0, 1, 3]))):
            scheduler.add(coming.pop())
        if chunks := scheduler.schedule():
            sent.append((chunks, step(pack(chunks, config.block_size))))
        while len(sent) > (depth if chunks else 0):
            done, sampled = sent.popleft()
            for seq, _, row in scheduler.commit(done, sampled.token_ids.tolist()):
                if sampled.logprobs is not None:
                    logprobs[seq].append(float(sampled.logprobs[row]))
        scheduler.check()
    return scheduler, list(logprobs.values())


def sequence(ids: list[int], params: Any) -> Sequence:
    return Sequence(array("i", ids), params)
