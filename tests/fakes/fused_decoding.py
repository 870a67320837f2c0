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
    """Computes the step of its inputs anew each time, where graphs would replay it."""

    replays = 0

    def __init__(self, decode: Any, inputs: Inputs, pool: Any) -> None:
        self._decode, self._inputs = decode, inputs

    def replay(self, plan: Plan) -> Any:
        Uncaptured.replays += 1
        inputs, count = self._inputs, len(plan.rows)
        inputs.fill(plan)
        step = replace(inputs.step, host_lengths=inputs.step.kv_lengths.numpy().copy(), kept={})
        logits, tokens = self._decode.forward(inputs.ids, inputs.positions, inputs.slots, step)
        if plan.sampling.plain and not plan.sampling.greedy:
            tokens = self._decode._sampler._chosen(logits[:count], plan.sampling)  # no kernels here
            self._decode._last[inputs.slots[:count]] = tokens.clamp(min=0)
        return logits[:count], tokens[:count]
