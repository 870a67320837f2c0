"""What decoders have on CUDA, on CPU: layers fused by plain torch operations, whole steps without their graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from decoding import Decoders

from backend.compute import blocks, fused
from backend.compute.graphs import Inputs
from backend.config import EngineConfig
from backend.generation.capacity import Capacity
from backend.generation.plan import Plan


class FusedDecoders(Decoders):
    """They count as worth it here."""

    def open(self, config: EngineConfig, num_blocks: int) -> Capacity:
        with patch.object(blocks, "pays", lambda device: True), patch.object(fused, "pays", lambda device, dtype: True):
            return super().open(config, num_blocks)

    def blocks(self) -> int:
        """How many layers are fused."""
        return sum(isinstance(module.forward, blocks.Block) for module in self.decoder._model.modules())


class Uncaptured:
    """Computes the step of its inputs anew each time, where a graph would replay it."""

    replays = 0

    def __init__(self, forward: Any, inputs: Inputs, pool: Any) -> None:
        self._forward, self._inputs = forward, inputs

    def replay(self, plan: Plan) -> Any:
        Uncaptured.replays += 1
        self._inputs.fill(plan)
        lengths = self._inputs.step.kv_lengths.numpy().copy()
        step = replace(self._inputs.step, host_lengths=lengths, kept={})
        logits, tokens = self._forward(self._inputs.ids, self._inputs.positions, self._inputs.slots, step)
        return logits[: len(plan.rows)], tokens[: len(plan.rows)]
