"""Plans as the engine sends them, made ahead of time by its own scheduler. It does not know who computes them.

The scheduler plays with made-up tokens, one step ahead of what it knows, so a decode step's ids are LAST_TOKEN. Block
numbers are then shuffled: an engine that has served for a while finds free blocks anywhere.
"""

from __future__ import annotations

import pickle
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from backend.generation.blocks import BlockPool
from backend.generation.plan import Ints, Plan, pack
from backend.generation.scheduler import Chunk, Scheduler
from backend.generation.sequence import SamplingParams, Sequence


@dataclass(frozen=True)
class Play:
    """An engine's limits, and how its sequences sample."""

    num_blocks: int
    block_size: int
    step_tokens: int
    max_sequences: int
    vocab: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def scheduler(self) -> Scheduler:
        return Scheduler(BlockPool(self.num_blocks, self.block_size), self.max_sequences, self.step_tokens)

    def sequence(self, prompt: int, new: int, seed: int) -> Sequence:
        ids = np.random.default_rng((self.seed, seed)).integers(3, self.vocab, prompt).astype(np.int32)
        params = SamplingParams(max_tokens=new, temperature=self.temperature, top_p=self.top_p, seed=seed)
        return Sequence(array("i", ids.tobytes()), params)


@dataclass(frozen=True)
class Made:
    """A step: its pickled plan, as a rank receives it, and what it computes."""

    plan: bytes
    chunks: tuple[tuple[int, int], ...]
    """New tokens, and the sequence's length with them."""

    @property
    def lengths(self) -> list[int]:
        return [new for new, _ in self.chunks]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def steps(play: Play, texts: list[tuple[int, int]]) -> Iterator[Made]:
    """Every step for texts of (prompt, new tokens) that start together."""
    scheduler, sent = play.scheduler(), deque[list[Chunk]]()
    for seed, (prompt, new) in enumerate(texts):
        scheduler.add(play.sequence(prompt, new, seed))
    where = np.random.default_rng(play.seed).permutation(play.num_blocks).astype(np.int32)
    while not scheduler.idle or sent:
        if chunks := scheduler.schedule():
            yield _made(pack(chunks, play.block_size), chunks, where, play.block_size)
            sent.append(chunks)
        if len(sent) > (1 if chunks else 0):
            done = sent.popleft()
            scheduler.commit(done, [3] * sum(chunk.samples for chunk in done))


def _made(plan: Plan, chunks: list[Chunk], where: Ints, block_size: int) -> Made:
    moved = pickle.dumps(shuffled(plan, where, block_size), pickle.HIGHEST_PROTOCOL)
    return Made(moved, tuple((chunk.length, chunk.start + chunk.length) for chunk in chunks))


def shuffled(plan: Plan, where: Ints, block_size: int) -> Plan:
    """The same plan with block `b` at `where[b]`."""
    blocks, offsets = np.divmod(plan.kv_slots, block_size)
    moved = where[blocks].astype(plan.kv_slots.dtype) * block_size + offsets
    return replace(plan, block_tables=where[plan.block_tables], kv_slots=moved)


def decodes(play: Play, batch: int, context: int, count: int) -> list[Made]:
    """`count` steps of one token for each of `batch` sequences, whose mean length is about `context`."""
    prompt = max(1, context - count // 2)
    quick = replace(play, step_tokens=max(play.step_tokens, batch * prompt))
    every = steps(quick, [(prompt, count + 2)] * batch)
    return list(islice((step for step in every if set(step.lengths) == {1} and step.tokens == batch), count))


def prefills(play: Play, prompt: int, count: int, running: int = 0, context: int = 1024) -> list[Made]:
    """`count` full steps of prompts of `prompt` tokens, beside `running` sequences that compute one token each."""
    before = -(-running * context // play.step_tokens)
    background = [(context, count + before + 2)] * running
    texts = [(prompt, 1)] * (count * play.step_tokens // prompt + 2)
    every = steps(play, background + texts)
    full = (step for step in every if step.tokens == play.step_tokens and step.lengths.count(1) >= running)
    return list(islice(full, count))
