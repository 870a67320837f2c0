"""A task without a model: numbers in, twice the numbers out, and a way to fail at every station."""

import os
import time

import numpy as np

from backend.errors import InvalidInput, LoadError
from backend.tasks.text import Ready


class ToyTask:
    """Rows: `numbers`, and `how` to go wrong."""

    worker = "toy_task:ToyWorker"

    def __init__(self, folder, config):
        self.config = config

    def parse(self, row):
        if row.get("how") == "unparsable":
            raise InvalidInput("how is wrong")
        return row

    def prepare(self, items):
        if any(item.get("how") == "prepare" for item in items):
            raise ValueError("prepare broke")
        return [self._pieces(item) for item in items]

    def _pieces(self, item):
        if item.get("how") == "refused":
            return InvalidInput("too long")
        return [(number, item.get("how", "")) for number in item["numbers"]]

    def cut(self, pieces):
        """By three, the last pieces first."""
        if any(how == "lost" for _, how in pieces):
            return [[0]]
        places = list(range(len(pieces)))[::-1]
        return [places[at : at + 3] for at in range(0, len(places), 3)]

    def batch(self, pieces):
        if any(how == "batch" for _, how in pieces):
            raise ValueError("batch broke")
        return list(pieces)

    def join(self, answers):
        if any(len(value) > 1 for value in answers[0]):
            raise ValueError("join broke")
        return answers[0]

    def finish(self, item, pieces, answers):
        if item.get("how") == "finish":
            raise ValueError("finish broke")
        assert [number for number, _ in pieces] == item["numbers"]
        return [float(value[0]) for value in answers]

    def outputs(self, results):
        if len({len(result) for result in results}) > 1:
            raise InvalidInput("rows of one request must be alike")
        return {"doubled": np.array(results)}


class ToyWorker:
    """Doubles, unless a piece says how to fail."""

    def __init__(self, birth, progress):
        self.rank, self.delay = birth.rank, 0.0
        if birth.config.max_waiting == 7:
            time.sleep(60)
        if birth.config.max_waiting == 8 and os.path.exists(f"{birth.config.model}/loaded"):
            raise LoadError("cannot be loaded again")
        open(f"{birth.config.model}/loaded", "w").close()

    def warm_up(self):
        return Ready(proof=0.25 * self.rank)

    def forward(self, batch):
        hows = {how for _, how in batch}
        if "raise" in hows:
            raise ValueError("the rank broke")
        if "die" in hows and self.rank == 0:
            os._exit(3)
        if "hang" in hows and self.rank == 0:
            time.sleep(60)
        if "slow" in hows:
            time.sleep(0.3)
        answers = [np.array([number * 2.0, 0.0][: 1 + (how == "join")]) for number, how in batch]
        if "fewer" in hows:
            answers = answers[1:]
        return (lambda: answers) if "deferred" in hows else answers
