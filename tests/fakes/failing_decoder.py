"""The real decoder, but for some token ids: at their sight one rank misbehaves, before the step's first collective."""

import os
import signal

from backend.compute.decoder import Decoder
from backend.compute.room import SPARE

RAISES, DIES, STARVES, FULL = 290, 291, 292, 293
"""STARVES: rank 1 has no memory for a step with this token; FULL: for any step of more than FEW tokens."""
FEW = 10


class FailingDecoder(Decoder):
    def __init__(self, birth, progress):
        super().__init__(birth, progress)
        self.misbehaves = birth.rank == birth.world - 1
        self._plan = None
        self._room.counted = True
        self._room._has = self._has

    def step(self, plan):
        if self.misbehaves and RAISES in plan.input_ids:
            raise ValueError("only here")
        if self.misbehaves and DIES in plan.input_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(plan)

    def _needs(self, plan):
        self._plan = plan
        return super()._needs(plan)

    def _has(self, count):
        """Stands for the device's allocator, which has no memory on one rank."""
        assert count >= SPARE
        ids = () if self._plan is None else self._plan.input_ids  # none: at load
        short = STARVES in ids or (FULL in ids and len(ids) > FEW)
        return not (self.misbehaves and short)
