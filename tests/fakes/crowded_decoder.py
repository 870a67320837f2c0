"""The real decoder on CUDA, whose last rank's device another program fills and leaves again, at the sight of tokens."""

import torch

from backend.compute.decoder import Decoder

FILLS, FREES = 292, 293
LEFT = 16 << 20
"""Bytes left free: less than Room asks for in any case."""


class CrowdedDecoder(Decoder):
    def __init__(self, birth, progress):
        super().__init__(birth, progress)
        self._last_rank = birth.rank == birth.world - 1
        self._ballast = None

    def step(self, plan):
        if self._last_rank and FILLS in plan.input_ids and self._ballast is None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._ballast = torch.empty(torch.cuda.mem_get_info()[0] - LEFT, dtype=torch.uint8, device=self._device)
        if self._last_rank and FREES in plan.input_ids:
            self._ballast = None
            torch.cuda.empty_cache()
        return super().step(plan)
