"""The real encoder, but the last rank has no device memory for a micro-batch with the token STARVES."""

import os

from backend.compute.encoders.encoder import Encoder
from backend.compute.room import SPARE


class FailingEncoder(Encoder):
    def __init__(self, birth, progress):
        super().__init__(birth, progress)
        self._short = birth.rank == birth.world - 1
        self._batch = None
        self._room.counted = True
        self._room._has = self._has

    def _tried(self, batch):
        self._batch = batch
        return super()._tried(batch)

    def _has(self, count):
        assert count >= SPARE
        return not (self._short and int(os.environ["STARVES"]) in self._batch.input_ids)
