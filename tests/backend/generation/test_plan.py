from __future__ import annotations

import pickle
from array import array
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from backend.generation.blocks import BlockPool
from backend.generation.plan import LAST_TOKEN, Sampled, pack
from backend.generation.scheduler import Scheduler
from backend.generation.sequence import SamplingParams, Sequence

DEFAULTS = {
    "temperature": 1,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "seeds": 0,
    "counters": 0,
}


def running(*sequences: Sequence, num_blocks: int = 50, block_size: int = 4, step_tokens: int = 16) -> Scheduler:
    scheduler = Scheduler(BlockPool(num_blocks, block_size), 8, step_tokens)
    for seq in sequences:
        scheduler.add(seq)
    return scheduler


def sequence(length: int, first: int = 0, **params: Any) -> Sequence:
    return Sequence(array("i", range(first, first + length)), SamplingParams(**{"max_tokens": 8, **params}))


def test_chunks_become_arrays() -> None:
    a, b, c = sequence(2), sequence(9, first=20), sequence(20, first=40)
    scheduler = running(a, b, c)
    scheduler.commit(scheduler.schedule(), [77, 78])
    c_blocks = list(c.blocks)
    plan = pack(scheduler.schedule(), 4)
    assert plan.input_ids.tolist() == [77, 78, *range(45, 59)]
    assert plan.positions.tolist() == [2, 9, *range(5, 19)]
    assert plan.query_starts.tolist() == [0, 1, 2, 16]
    assert plan.kv_lengths.tolist() == [3, 10, 19]
    assert plan.kv_slots.tolist() == [
        a.blocks[0] * 4 + 2,
        b.blocks[2] * 4 + 1,
        *(c_blocks[p // 4] * 4 + p % 4 for p in range(5, 19)),
    ]
    assert plan.block_tables.tolist() == [[a.blocks[0], 0, 0, 0, 0], [*b.blocks, 0, 0], c_blocks]
    assert plan.slots.tolist() == [a.slot, b.slot, c.slot]
    assert plan.rows.tolist() == [0, 1]
    assert plan.sampling.counters.tolist() == [1, 1]
    assert not plan.decode


def test_types_are_those_of_the_contract_and_arrays_can_be_written() -> None:
    plan = pack(running(sequence(2), sequence(3, first=9, stop_token_ids=frozenset({1}), min_tokens=1)).schedule(), 4)
    for owner in (plan, plan.sampling):
        for field in fields(owner):
            dtype = {"Ints": np.int32, "Longs": np.int64, "Floats": np.float32}.get(str(field.type))
            if dtype:
                array_ = getattr(owner, field.name)
                assert (array_.dtype, array_.flags.writeable, array_.flags.c_contiguous) == (dtype, True, True)


def test_the_table_is_as_wide_as_the_step_needs() -> None:
    scheduler = running(sequence(40), step_tokens=6)
    assert pack(scheduler.schedule(), 4).block_tables.shape == (1, 2)
    assert pack(scheduler.schedule(), 4).block_tables.shape == (1, 3)


def test_a_token_in_flight_is_left_to_the_ranks() -> None:
    scheduler = running(sequence(3))
    first, second, third = (pack(scheduler.schedule(), 4) for _ in range(3))
    assert first.input_ids.tolist() == [0, 1, 2]
    for plan, position in ((second, 3), (third, 4)):
        assert plan.input_ids.tolist() == [LAST_TOKEN]
        assert plan.positions.tolist() == [position]
        assert plan.sampling.counters.tolist() == [position - 2]
        assert plan.decode


def test_a_plan_is_not_changed_by_what_happens_later() -> None:
    seq = sequence(4, repetition_penalty=2.0)
    scheduler = running(seq)
    chunks = scheduler.schedule()
    plan = pack(chunks, 4)
    before = [plan.input_ids.tolist(), plan.block_tables.tolist(), plan.histories[0].prompt.tolist()]
    scheduler.commit(chunks, [5])
    scheduler.schedule()
    seq.tokens[0] = seq.blocks[0] = 99
    assert [plan.input_ids.tolist(), plan.block_tables.tolist(), plan.histories[0].prompt.tolist()] == before


def test_defaults_are_given_as_arrays() -> None:
    sampling = pack(running(sequence(2), sequence(3, first=9)).schedule(), 4).sampling
    for name, value in DEFAULTS.items():
        assert getattr(sampling, name).tolist() == [value, value]
    assert sampling.blocked.shape == (0, 2)
    assert (sampling.logprobs, sampling.penalised, sampling.greedy) == (False, False, False)


def test_each_row_has_its_own_parameters() -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 2**31 - 1,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "frequency_penalty": -2.0,
        "presence_penalty": 2.0,
    }
    sampling = pack(running(sequence(2), sequence(3, first=9, logprobs=True, **given)).schedule(), 4).sampling
    for name, value in given.items():
        assert getattr(sampling, name).tolist() == [DEFAULTS[name], value]
    assert sampling.logprobs


@pytest.mark.parametrize("seed", [0, 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_keeps_its_64_bits(seed: int) -> None:
    seeds = pack(running(sequence(2, seed=seed)).schedule(), 4).sampling.seeds
    assert seeds.view(np.uint64).tolist() == [seed]


def test_ends_are_blocked_until_min_tokens_even_in_flight() -> None:
    scheduler = running(sequence(2), sequence(2, first=9, min_tokens=2, stop_token_ids=frozenset({6, 5})))
    blocked = [pack(scheduler.schedule(), 4).sampling.blocked.tolist() for _ in range(3)]
    assert blocked == [[[1, 5], [1, 6]], [[1, 5], [1, 6]], []]


def test_the_history_comes_once_for_each_admission() -> None:
    plain, counted = sequence(2), sequence(6, first=9, presence_penalty=1.0)
    scheduler = running(plain, counted, step_tokens=4, num_blocks=8)
    chunks = scheduler.schedule()
    (history,) = pack(chunks, 4).histories
    assert (history.slot, history.prompt.tolist(), history.completion.tolist()) == (counted.slot, [*range(9, 15)], [])
    scheduler.commit(chunks, [50])
    for _ in range(3):
        chunks = scheduler.schedule()
        assert pack(chunks, 4).histories == ()
        scheduler.commit(chunks, [50] * int(sum(chunk.samples for chunk in chunks)))


def test_the_history_after_preemption_holds_the_completion() -> None:
    old, young = sequence(1, max_tokens=6), sequence(1, first=9, max_tokens=6, frequency_penalty=1.0)
    scheduler = running(old, young, num_blocks=3, block_size=2)
    histories = []
    while not scheduler.idle:
        chunks = scheduler.schedule()
        histories += pack(chunks, 2).histories
        scheduler.commit(chunks, [40 + len(young.tokens)] * len(chunks))
    assert scheduler.preemptions == 1
    assert [(h.prompt.tolist(), h.completion.tolist()) for h in histories] == [([9], []), ([9], [41, 42])]


def test_a_plan_and_its_answer_arrive_as_they_were_sent() -> None:
    given = {"temperature": 0.5, "presence_penalty": 2.0, "min_tokens": 3, "stop_token_ids": frozenset({5})}
    sent = pack(running(sequence(2), sequence(3, first=9, logprobs=True, **given)).schedule(), 4)
    plan = pickle.loads(pickle.dumps(sent, protocol=5))
    for name in (field.name for field in fields(sent) if field.name not in ("sampling", "histories")):
        assert np.array_equal(getattr(plan, name), getattr(sent, name)), name
    for name in (field.name for field in fields(sent.sampling)):
        assert np.array_equal(getattr(plan.sampling, name), getattr(sent.sampling, name)), name
    assert [history.slot for history in plan.histories] == [history.slot for history in sent.histories] != []
    answer = pickle.loads(pickle.dumps(Sampled(plan.slots, None), protocol=5))
    assert answer.token_ids.tolist() == plan.slots.tolist() and answer.logprobs is None


def test_parameters_follow_their_sequences_when_others_end_or_come() -> None:
    scheduler = running(sequence(2, temperature=0.25, max_tokens=2), sequence(2, first=9, temperature=0.5))
    scheduler.commit(scheduler.schedule(), [7, 7])
    seen = []
    for _ in range(3):
        chunks = scheduler.schedule()
        sampling = pack(chunks, 4).sampling
        seen.append((sampling.temperature.tolist(), sampling.counters.tolist()))
        scheduler.commit(chunks, [7] * len(sampling.counters))
        if len(seen) == 2:
            scheduler.add(sequence(2, first=20, temperature=0.75))
    assert seen == [([0.25, 0.5], [1, 1]), ([0.5], [2]), ([0.5, 0.75], [3, 0])]
