"""Decoders on CPU whose layers are fused as on CUDA, by the plain torch operations that stand for the kernels."""

from __future__ import annotations

from unittest.mock import patch

from decoding import Decoders

from backend.compute import blocks, fused
from backend.config import EngineConfig
from backend.generation.capacity import Capacity


class FusedDecoders(Decoders):
    """They count as worth it here."""

    def open(self, config: EngineConfig, num_blocks: int) -> Capacity:
        with patch.object(blocks, "pays", lambda device: True), patch.object(fused, "pays", lambda device, dtype: True):
            return super().open(config, num_blocks)

    def blocks(self) -> int:
        """How many layers are fused."""
        return sum(isinstance(module.forward, blocks.Block) for module in self.decoder._model.modules())
