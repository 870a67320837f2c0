"""What decoders have on CUDA, on CPU: layers fused by plain torch operations, whole steps without their graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from decoding import Decoders

from backend.compute import blocks, fused, prompt_graphs
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


class UncapturedPrompt:
    """The same for steps with prompts: attention is called where a piece would end."""

    replays = 0

    def __init__(self, forward: Any, inputs: prompt_graphs.Inputs, step: Any, places: Any, pool: Any) -> None:
        self._forward, self._inputs, self._places = forward, inputs, places
        self._compute(step, lambda attention, output: None)

    def seconds(self) -> float:
        """As if 16 tokens took longer than 24."""
        size = len(self._inputs.ids)
        return 40.0 if size == 16 else float(size)

    def replay(self, plan: Plan, live: Any) -> Any:
        UncapturedPrompt.replays += 1

        def between(attention: prompt_graphs.Attention, output: Any) -> None:
            attention(live, output[: len(plan.input_ids)])

        self._inputs.fill(plan)
        return self._compute(live, between)[: len(plan.rows)]

    def _compute(self, step: Any, between: prompt_graphs.Between) -> Any:
        given = self._inputs
        cut = replace(step, kv_slots=given.kv_slots, kernel=prompt_graphs.Cut(self._places, between), kept={})
        return self._places.copied("logits", self._forward(given.ids, given.positions, given.slots, cut, given.ends))
