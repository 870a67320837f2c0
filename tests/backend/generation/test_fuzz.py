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
from itertools import accumulate
from math import inf

import pytest

from backend.generation.blocks import BlockPool
from backend.generation.plan import LAST_TOKEN, Plan, pack
from backend.generation.scheduler import Chunk, Scheduler, prompt_tokens
from backend.generation.sequence import SamplingParams, Sequence

Counts = tuple[tuple[tuple[int, int], ...], ...]

VOCABULARY = 29
ROUNDS = int(os.environ.get("TRITONSPEED_FUZZ_ROUNDS", "60"))
"""Schedules of each of the 20 fuzz tests."""


# The model: a cell hashes all tokens up to its own; the next token depends on the last cell and the row's inputs.


def start_of(salt: bytes) -> int:
    return hash((int.from_bytes(salt, "big"), 1))


def cell_of(before: int, token: int) -> int:
    return hash((before, token))


def choice(cell: int, seed: int, counter: int, counts: Counts, blocked: set[int]) -> int:
    attempt = 0
    while (token := hash((cell, seed, counter, counts, attempt)) % VOCABULARY) in blocked:
        attempt += 1
    return token


def frozen(prompt: Counter[int], completion: Counter[int]) -> Counts:
    return tuple(sorted(prompt.items())), tuple(sorted(completion.items()))


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
    cells = list(accumulate(prompt, cell_of, initial=start_of(seq.salt)))[1:]
    for index in range(params.max_tokens):
        counts = frozen(Counter(prompt), Counter(tokens[len(prompt) :])) if params.penalised else ()
        blocked = set(params.stop_token_ids) if index < params.min_tokens else set()
        tokens.append(choice(cells[-1], params.seed, index, counts, blocked))
        cells.append(cell_of(cells[-1], tokens[-1]))
        if not reason and tokens[-1] in params.stop_token_ids:
            length, reason = len(tokens), "stop"
    return Truth(tokens, length or len(tokens), reason or "length", cells)


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
            length, size = int(plan.kv_lengths[s]), self.block_size
            addresses = [block * size + i for block in plan.block_tables[s].tolist() for i in range(size)]
            assert [self.kv[address] for address in addresses[:length]] == truths[chunk.seq].cells[:length]
        return [self._sample(plan, row, s) for row, s in enumerate(plan.rows.tolist())]

    def _write(self, plan: Plan, s: int, salt: bytes) -> None:
        for t in range(plan.query_starts[s], plan.query_starts[s + 1]):
            position, token = int(plan.positions[t]), int(plan.input_ids[t])
            if token == LAST_TOKEN:
                token = self.last[int(plan.slots[s])]
            before = self.kv[self._address(plan, s, position - 1)] if position else start_of(salt)
            assert plan.kv_slots[t] == self._address(plan, s, position)
            self.kv[int(plan.kv_slots[t])] = cell_of(before, token)

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
        token = choice(cell, seed, counter, frozen(*counts) if counts else (), blocked)
        if counts:
            counts[1][token] += 1
        self.last[slot] = token
        return token


class EagerPool(BlockPool):
    """Admits as long as there is a block: preemption becomes common."""

    def admit(self, seq: Sequence, spare: int = 0) -> bool:
        return super().admit(seq)


class Game:
    """One random schedule: sequences come, go and expire while steps are computed `depth` behind the scheduler."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        size = rng.choice([1, 1, 2, 3, 4, 8])
        self.room = rng.choice([12, 24, 36])  # tokens of the longest sequence, but its last
        num_blocks = -(-self.room * rng.choice([1, 1.5, 2, 3, 20]) // size)
        self.pool = rng.choice([BlockPool, EagerPool])(int(num_blocks), size)
        self.scheduler = Scheduler(
            self.pool, rng.randint(1, 12), rng.choice([1, 4, 6, 8, 12, 64]), rng.choice([0, 0, 0.5, 1, 2])
        )
        self.varied = rng.random() < 0.5
        self.ranks = Ranks(size)
        self.depth = rng.choice([0, 0, 1, 1, 1, 2, 3])
        self.sent: deque[tuple[list[Chunk], Plan]] = deque()
        self.now = 0.0
        self.stem = [rng.randrange(VOCABULARY) for _ in range(self.room)]
        self.coming = [self._sequence() for _ in range(rng.randint(1, 20))]
        self.truths = {seq: truth_of(seq) for seq in self.coming}

    def _sequence(self) -> Sequence:
        rng = self.rng
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3))]
        prompt = (self.stem[: rng.choice([0, 0, self.room // 4, rng.randrange(self.room)])] + own)[: self.room]
        longest = self.room + 1 - len(prompt)
        max_tokens = rng.choice([longest, rng.randint(1, longest)])
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, rng.randint(0, max_tokens)]),
            seed=rng.choice([0, 7, 2**64 - 1]),
            stop_token_ids=frozenset(rng.sample(range(VOCABULARY), rng.choice([0, 0, 1, 3]))),
            **rng.choice([{}, {}, {"repetition_penalty": 1.5}, {"presence_penalty": -0.5}, {"frequency_penalty": 1.0}]),
        )
        deadline = rng.choice([inf] * 6 + [rng.uniform(0, 60)])
        salt = rng.choice([b"", b"", b"", b"tenant"])
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
        if self.varied:
            self.scheduler.prefill_budget = rng.randint(1, self.scheduler.step_tokens)
        for _ in range(min(rng.choice([0, 0, 0, 1, 2, 20]), len(self.coming))):
            self.scheduler.add(self.coming.pop())
        if rng.random() < 0.02:
            self.scheduler.abort(rng.choice([seq for seq in self.truths if seq not in self.coming] or self.coming))
            self.coming = [seq for seq in self.coming if not seq.finish_reason]
        for seq in self.scheduler.expire(self.now):
            assert seq.deadline <= self.now
            assert seq.finish_reason == "deadline"

    def _send(self, chunks: list[Chunk]) -> None:
        assert sum(chunk.length for chunk in chunks) <= self.scheduler.step_tokens
        assert prompt_tokens(chunks) <= self.scheduler.prefill_budget
        assert all(chunk.seq.slot >= 0 for chunk in chunks)
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
