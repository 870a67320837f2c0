"""A decoder without a model: the next token is a function of all tokens before it, read back from a paged memory.

So a wrong block, slot, position or order of steps shows as a wrong token. Some token ids make it misbehave.
"""

import os
import signal
import time

import numpy as np

from backend.errors import LoadError
from backend.generation.capacity import Capacity
from backend.generation.plan import LAST_TOKEN, Sampled

VOCAB = 200
END = 2
CRASH, HANG, NAN, SLOW = 190, 191, 192, 193


def next_token(tokens):
    """3 to 99, sometimes END; depends on every token and its place."""
    value = sum((place + 1) * (token + 7) for place, token in enumerate(tokens)) % 1009
    return END if value % 37 == 0 else 3 + value % 97


def truth(prompt, max_tokens, ends=(END,)):
    """The completion, one token at a time."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


class CountingDecoder:
    def __init__(self, birth, progress):
        self.config = birth.config
        self.last = np.zeros(birth.config.max_sequences, np.int64)
        if os.path.exists(os.path.join(birth.config.model, "refuse")):
            raise LoadError("told to refuse")

    def capacity(self):
        return Capacity(num_blocks=1000, max_model_len=512, vocab_size=VOCAB)

    def allocate(self, num_blocks, max_model_len):
        self.memory = np.full(num_blocks * self.config.block_size, -1)

    def warm_up(self):
        pass

    def step(self, plan):
        slots = np.repeat(plan.slots, np.diff(plan.query_starts))
        ids = np.where(plan.input_ids == LAST_TOKEN, self.last[slots], plan.input_ids)
        self.misbehave(ids)
        self.memory[plan.kv_slots] = ids
        sampled = np.array([self.sample(plan, row) for row in plan.rows], np.int32)
        self.last[plan.slots[plan.rows]] = sampled
        logprobs = -sampled.astype(np.float32) / 100 if plan.sampling.logprobs else None
        return Sampled(np.where(ids[plan.query_starts[1:][plan.rows] - 1] == NAN, -1, sampled), logprobs)

    def sample(self, plan, row):
        size = self.config.block_size
        places = np.arange(plan.kv_lengths[row])
        tokens = self.memory[plan.block_tables[row][places // size] * size + places % size].tolist()
        if SLOW in tokens:
            time.sleep(0.02)
        return next_token(tokens)

    def misbehave(self, ids):
        if CRASH in ids:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in ids:
            time.sleep(600)
