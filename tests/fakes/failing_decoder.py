"""The real decoder, but for one token id: at its sight one rank misbehaves, before the step's first collective."""

import os
import signal

from backend.compute.decoder import Decoder

RAISES, DIES = 290, 291


class FailingDecoder(Decoder):
    def __init__(self, birth, progress):
        super().__init__(birth, progress)
        self.misbehaves = birth.rank == 1

    def step(self, plan):
        if self.misbehaves and RAISES in plan.input_ids:
            raise ValueError("only here")
        if self.misbehaves and DIES in plan.input_ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(plan)
