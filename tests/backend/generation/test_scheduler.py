"""Any schedule must give the tokens that one sequence at a time would.

The fuzz plays the ranks: it computes the packed plans on a simulated KV memory, whose cells hold the hash of the whole
prefix that they were written for, so that a stale or foreign block read anywhere is found.
"""

from __future__ import annotations

import os
import random
from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf

import pytest

from backend.errors import InvalidInput
from backend.generation.blocks import BlockPool
from backend.generation.plan import LAST_TOKEN, Plan, pack
from backend.generation.scheduler import Chunk, Scheduler
from backend.generation.sequence import SamplingParams, Sequence

VOCABULARY = 29
ROUNDS = int(os.environ.get("TRITONSPEED_FUZZ_ROUNDS", "100"))
"""Schedules of each of the 20 fuzz tests."""


# The model: a cell is the hash of all tokens up to its own; the next token depends on the last cell and the row's inputs.


def mixed(*values: object) -> int:
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest(), "big")


def cells_of(tokens: list[int], salt: bytes) -> list[int]:
    cells, cell = [], mixed(salt)
    for token in tokens:
        cells.append(cell := mixed(cell, token))
    return cells


def choice(cell: int, seed: int, counter: int, counts: object, blocked: set[int]) -> int:
    attempt = 0
    while (token := mixed(cell, seed, counter, counts, attempt) % VOCABULARY) in blocked:
        attempt += 1
    return token


def frozen(counts: tuple[Counter[int], Counter[int]]) -> object:
    return tuple(tuple(sorted(counter.items())) for counter in counts)


@dataclass
class Truth:
    """What a sequence must become: computed alone, and past its end, for steps that were sent too early."""

    tokens: list[int]
    length: int
    reason: str
    cells: list[int]


def truth_of(seq: Sequence) -> Truth:
    params, prompt = seq.params, list(seq.tokens)
    tokens, length, reason = list(prompt), 0, ""
    for index in range(params.max_tokens):
        counts = frozen((Counter(prompt), Counter(tokens[len(prompt) :]))) if params.penalised else None
        blocked = set(params.stop_token_ids) if index < params.min_tokens else set()
        tokens.append(choice(cells_of(tokens, seq.salt)[-1], params.seed, index, counts, blocked))
        if not reason and tokens[-1] in params.stop_token_ids:
            length, reason = len(tokens), "stop"
    return Truth(tokens, length or len(tokens), reason or "length", cells_of(tokens, seq.salt))


@dataclass
class Ranks:
    """Computes plans in order; knows of sequences only what is in the plans, but for checks."""

    block_size: int
    kv: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    counts: dict[int, tuple[Counter[int], Counter[int]]] = field(default_factory=dict)

    def step(self, plan: Plan, chunks: list[Chunk], truths: dict[Sequence, Truth]) -> list[int]:
        for history in plan.histories:
            self.counts[history.slot] = Counter(history.prompt.tolist()), Counter(history.completion.tolist())
        for s, chunk in enumerate(chunks):
            self._write(plan, s, chunk.seq.salt)
        for s, chunk in enumerate(chunks):
            seen = [self.kv[self._address(plan, s, position)] for position in range(plan.kv_lengths[s])]
            assert seen == truths[chunk.seq].cells[: len(seen)]
        return [self._sample(plan, row, s) for row, s in enumerate(plan.rows.tolist())]

    def _write(self, plan: Plan, s: int, salt: bytes) -> None:
        for t in range(plan.query_starts[s], plan.query_starts[s + 1]):
            position, token = int(plan.positions[t]), int(plan.input_ids[t])
            if token == LAST_TOKEN:
                token = self.last[int(plan.slots[s])]
            before = self.kv[self._address(plan, s, position - 1)] if position else mixed(salt)
            assert plan.kv_slots[t] == self._address(plan, s, position)
            self.kv[int(plan.kv_slots[t])] = mixed(before, token)

    def _address(self, plan: Plan, s: int, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return int(plan.block_tables[s, block]) * self.block_size + offset

    def _sample(self, plan: Plan, row: int, s: int) -> int:
        how, slot = plan.sampling, int(plan.slots[s])
        penalised = how.repetition_penalty[row] != 1 or how.frequency_penalty[row] or how.presence_penalty[row]
        counts = self.counts[slot] if penalised else None
        cell = self.kv[self._address(plan, s, int(plan.kv_lengths[s]) - 1)]
        seed, counter = int(how.seeds[row]) % 2**64, int(how.counters[row])
        blocked = {token for r, token in how.blocked.tolist() if r == row}
        token = choice(cell, seed, counter, counts and frozen(counts), blocked)
        if counts:
            counts[1][token] += 1
        self.last[slot] = token
        return token


class Game:
    """One random schedule: sequences come, go and expire while steps are computed `depth` behind the scheduler."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        size = rng.choice([1, 2, 3, 4, 8])
        self.pool = BlockPool(rng.choice([6, 12, 40, 200]), size, prefix_cache=rng.random() < 0.9)
        self.scheduler = Scheduler(self.pool, rng.randint(1, 10), rng.choice([1, 3, 8, 64]))
        self.ranks = Ranks(size)
        self.depth = rng.choice([0, 0, 1, 1, 1, 1, 2, 3])
        self.sent: deque[tuple[list[Chunk], Plan]] = deque()
        self.now = 0.0
        self.room = min(self.pool.num_blocks * size, 40)
        self.stem = [rng.randrange(VOCABULARY) for _ in range(self.room)]
        self.coming = [self._sequence() for _ in range(rng.randint(1, 16))]
        self.truths = {seq: truth_of(seq) for seq in self.coming}

    def _sequence(self) -> Sequence:
        rng = self.rng
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3))]
        prompt = (self.stem[: rng.randint(0, self.room // 2)] + own)[: max(1, self.room // 2)]
        max_tokens = rng.randint(1, self.room + 1 - len(prompt))
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
            seed=rng.choice([0, 7, 2**64 - 1]),
            stop_token_ids=frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 1, 3]))),
            **rng.choice([{}, {}, {"repetition_penalty": 1.5}, {"presence_penalty": -0.5}, {"frequency_penalty": 1.0}]),
        )
        deadline = rng.choice([inf, inf, inf, rng.uniform(0, 40)])
        salt = rng.choice([b"", b"", b"tenant"])
        return Sequence(array("i", prompt), params, rng.choice([0, 0, 1, -1]), deadline, salt)

    def play(self) -> None:
        steps = 0
        while self.coming or self.sent or not self.scheduler.idle:
            steps += 1
            assert steps < 5000, "no progress"
            self._disturb()
            if chunks := self.scheduler.schedule():
                self._send(chunks)
            else:
                assert self.sent or self.scheduler.idle
            while len(self.sent) > (self.depth if chunks else 0):
                self._receive()
            self.scheduler.check()
        self._check_end()

    def _disturb(self) -> None:
        rng, self.now = self.rng, self.now + 1
        for _ in range(min(rng.choice([0, 0, 1, 5]), len(self.coming))):
            self.scheduler.add(self.coming.pop())
        if rng.random() < 0.05:
            self.scheduler.abort(rng.choice([seq for seq in self.truths if seq not in self.coming] or self.coming))
            self.coming = [seq for seq in self.coming if not seq.finish_reason]
        for seq in self.scheduler.expire(self.now):
            assert seq.deadline <= self.now
            assert seq.finish_reason == "deadline"

    def _send(self, chunks: list[Chunk]) -> None:
        assert sum(chunk.length for chunk in chunks) <= self.scheduler.step_tokens
        assert len({chunk.seq.slot for chunk in chunks}) == len(chunks) == len({chunk.seq for chunk in chunks})
        self.sent.append((chunks, pack(chunks, self.pool.block_size)))
        self.scheduler.check()

    def _receive(self) -> None:
        chunks, plan = self.sent.popleft()
        sampled = self.ranks.step(plan, chunks, self.truths)
        for seq, token_id, row in self.scheduler.commit(chunks, sampled):
            assert seq is chunks[plan.rows[row]].seq
            assert seq.tokens[-1] == token_id == sampled[row]

    def _check_end(self) -> None:
        assert self.pool.num_free == self.pool.num_blocks
        for seq, truth in self.truths.items():
            assert (seq.in_flight, seq.slot, len(seq.blocks)) == (0, -1, 0)
            assert list(seq.tokens) == truth.tokens[: len(seq.tokens)]
            if seq.finish_reason in ("cancelled", "deadline"):
                assert len(seq.tokens) < truth.length
            else:
                assert (len(seq.tokens), seq.finish_reason) == (truth.length, truth.reason)


@pytest.mark.parametrize("part", range(20))
def test_any_schedule_yields_what_one_at_a_time_would(part: int) -> None:
    seen = Counter[str]()
    for seed in range(part * ROUNDS, (part + 1) * ROUNDS):
        game = Game(seed)
        game.play()
        seen += Counter(seq.finish_reason for seq in game.truths)
        seen += Counter(preemptions=game.scheduler.preemptions, hits=game.pool.prefix_hits)
    assert {
        "stop",
        "length",
        "cancelled",
        "deadline",
        "preemptions",
        "hits",
    } <= seen.keys()  # the fuzz reaches them all
