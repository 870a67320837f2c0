from __future__ import annotations

from array import array
from typing import Any

import pytest

from backend.errors import InvalidInput
from backend.generation.blocks import BlockPool
from backend.generation.scheduler import Chunk, Scheduler
from backend.generation.sequence import SamplingParams, Sequence


def sequence(length: int, max_tokens: int = 8, first: int = 0, **given: Any) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset(given.pop("stop", ())))
    return Sequence(array("i", range(first, first + length)), params, **given)


def scheduler(num_blocks: int = 100, block_size: int = 4, max_sequences: int = 8, step_tokens: int = 16) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), max_sequences, step_tokens)


def added(to: Scheduler, *sequences: Sequence) -> tuple[Sequence, ...]:
    for seq in sequences:
        to.add(seq)
    return sequences


def step(of: Scheduler, token_id: int = 99) -> list[Chunk]:
    chunks = of.schedule()
    of.commit(chunks, [token_id] * sum(chunk.samples for chunk in chunks))
    of.check()
    return chunks


def test_a_long_prompt_delays_no_decode() -> None:
    s = scheduler()
    decodes = added(s, *(sequence(1, 100, first=i) for i in range(3)))
    step(s)
    (long,) = added(s, sequence(60, 100, first=50, priority=-1))
    for _ in range(4):
        chunks = step(s)
        assert [chunk.seq for chunk in chunks] == [*decodes, long]
        assert sum(chunk.length for chunk in chunks) == s.step_tokens
    assert [len(seq.completion) for seq in decodes] == [5, 5, 5]
    assert step(s)[-1].samples
    assert len(long.completion) == 1


def test_every_running_sequence_advances_however_small_the_step() -> None:
    s = scheduler(max_sequences=8, step_tokens=3)
    added(s, *(sequence(4, 50, first=10 * i) for i in range(5)))
    for _ in range(8):
        step(s)
    before = {seq: seq.computed for seq in s._running}
    assert s.num_running == 3
    step(s)
    assert all(seq.computed > before[seq] for seq in before)


def test_admission_is_by_priority_then_arrival() -> None:
    s = scheduler(max_sequences=1)
    late, low, high = added(s, sequence(2), sequence(2, priority=1), sequence(2, priority=-1))
    order = []
    while not s.idle:
        order += [chunk.seq for chunk in step(s) if chunk.first]
    assert order == [high, late, low]


def test_chunks_of_one_step_share_its_budget() -> None:
    s = scheduler(step_tokens=16)
    added(s, sequence(10), sequence(10, first=20), sequence(10, first=40))
    assert [(c.start, c.length, c.samples, c.first) for c in step(s)] == [(0, 10, True, True), (0, 6, False, True)]
    assert [(c.start, c.length, c.samples, c.first) for c in step(s)] == [
        (10, 1, True, False),
        (6, 4, True, False),
        (0, 10, True, True),
    ]


def test_exactly_what_the_cache_holds_is_served() -> None:
    s = scheduler(num_blocks=4, block_size=4)
    (seq,) = added(s, sequence(7, max_tokens=10))
    while not s.idle:
        step(s)
    assert (seq.finish_reason, len(seq.tokens), s.preemptions) == ("length", 17, 0)
    with pytest.raises(InvalidInput, match=r"prompt \(7\) plus max_tokens \(11\) exceeds the KV cache's 17 tokens"):
        s.add(sequence(7, max_tokens=11))
    assert s.idle


@pytest.mark.parametrize(("length", "max_tokens"), [(0, 1), (1, 0), (1, -1)])
def test_nothing_to_compute_is_refused(length: int, max_tokens: int) -> None:
    with pytest.raises(InvalidInput, match="must be at least 1 token"):
        scheduler().add(sequence(length, max_tokens))


def test_stop_and_length_end_a_sequence() -> None:
    s = scheduler()
    stops, fills = added(s, sequence(3, stop={7}), sequence(3, max_tokens=2, first=10))
    accepted = s.commit(s.schedule(), [7, 7])
    assert [(a.seq, a.token_id, a.row) for a in accepted] == [(stops, 7, 0), (fills, 7, 1)]
    assert (stops.finish_reason, fills.finish_reason) == ("stop", "")
    step(s)
    assert (list(fills.completion), fills.finish_reason, s.idle) == ([7, 99], "length", True)


def test_a_step_sent_ahead_drops_the_token_of_a_sequence_that_ended() -> None:
    s = scheduler()
    stops, goes_on = added(s, sequence(3, stop={7}), sequence(3, first=10))
    one, two = s.schedule(), s.schedule()
    s.commit(one, [7, 1])
    assert s.pool.num_free == s.pool.num_blocks - len(goes_on.blocks)
    assert [(a.seq, a.token_id, a.row) for a in s.commit(two, [5, 6])] == [(goes_on, 6, 1)]
    assert list(stops.completion) == [7]
    assert list(goes_on.completion) == [1, 6]


def test_no_more_tokens_are_sent_for_than_may_be_accepted() -> None:
    s = scheduler()
    added(s, sequence(3, max_tokens=2))
    steps = [s.schedule() for _ in range(4)]
    assert [len(chunks) for chunks in steps] == [1, 1, 0, 0]
    assert not s.idle
    for chunks in steps[:2]:
        s.commit(chunks, [1])
    assert s.idle


def test_too_few_or_too_many_tokens_are_an_error() -> None:
    for tokens in ([], [1, 2]):
        s = scheduler()
        added(s, sequence(3))
        with pytest.raises(ValueError, match="tokens for"):
            s.commit(s.schedule(), tokens)


def test_abort_frees_blocks_and_slot_at_once() -> None:
    s = scheduler(max_sequences=1)
    running, waiting = added(s, sequence(3), sequence(3, first=10))
    chunks = s.schedule()
    s.abort(running)
    s.abort(waiting, "gone")
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "gone")
    assert (s.idle, s.pool.num_free, s.commit(chunks, [1])) == (True, s.pool.num_blocks, [])
    s.abort(running, "again")
    assert running.finish_reason == "cancelled"
    s.check()


def test_who_is_aborted_before_it_comes_is_not_queued() -> None:
    s = scheduler()
    seq = sequence(3, deadline=1.0)
    s.abort(seq)
    s.add(seq)
    assert (s.idle, s.expire(2.0)) == (True, [])


def test_deadlines_hold_while_waiting_and_while_running() -> None:
    s = scheduler(max_sequences=1)
    running, waiting, patient = added(
        s, sequence(3, deadline=5.0), sequence(3, first=10, deadline=4.0), sequence(3, first=20)
    )
    step(s)
    assert s.expire(3.9) == []
    assert s.expire(5.0) == [waiting, running]
    assert {seq.finish_reason for seq in (waiting, running)} == {"deadline"}
    assert (s.num_running, s.num_waiting) == (0, 1)
    assert [chunk.seq for chunk in step(s)] == [patient]


def tight() -> tuple[Scheduler, Sequence, Sequence]:
    """Six blocks of one token; `old` has two steps in flight, `young` half its prompt of four, and no block is left."""
    s = scheduler(num_blocks=6, block_size=1, step_tokens=2)
    old, young = added(s, sequence(1, max_tokens=6), sequence(4, max_tokens=3, first=10))
    return s, old, young


def test_the_youngest_is_preempted_and_resumes() -> None:
    s, old, young = tight()
    steps = 0
    while not s.idle:
        step(s, token_id=steps)
        steps += 1
    assert s.preemptions > 0
    assert (len(old.completion), len(young.completion)) == (6, 3)
    assert list(old.completion) == list(range(6))  # never held up


def test_priority_decides_who_is_preempted() -> None:
    s = scheduler(num_blocks=6, block_size=1)
    low, high = added(s, sequence(1, 5, priority=1), sequence(1, 5, first=10))
    while not s.preemptions:
        chunks = step(s)
    assert [chunk.seq for chunk in chunks] == [high]
    assert s.num_waiting == 1
    assert low.slot == -1


def test_a_preempted_sequence_keeps_its_tokens_in_flight_and_waits_for_them() -> None:
    s = scheduler(num_blocks=6, block_size=1)
    old, young = added(s, sequence(1, 6), sequence(1, 6, first=10))
    sent = [s.schedule() for _ in range(4)]
    assert s.preemptions == 1
    assert (young.in_flight, len(young.blocks), len(sent[3])) == (3, 0, 1)
    s.abort(old)
    for chunks in sent[:3]:
        assert s.schedule() == []
        s.commit(chunks, [1, 2])
    (chunk,) = s.schedule()
    assert (chunk.seq, list(young.completion), chunk.start + chunk.length) == (young, [2, 2, 2], 4)


def test_a_step_publishes_nothing_once_its_blocks_were_lost() -> None:
    s, old, young = tight()
    one, two, three = s.schedule(), s.schedule(), s.schedule()
    assert s.preemptions == 1
    s.abort(old)
    four = s.schedule()  # young again, in other blocks, with one and two still on their way
    assert [(c.seq, c.start, c.length) for c in one + two + four if c.seq is young] == [
        (young, 0, 1),
        (young, 1, 1),
        (young, 0, 2),
    ]
    for chunks in (one, two, three):
        s.commit(chunks, [1])
    s.abort(young)
    added(s, sequence(5, max_tokens=1, first=10))
    assert s.schedule()[0].start == 0


def test_samples_of_one_prompt_compute_it_once() -> None:
    s = scheduler(step_tokens=64)
    first, *others = added(s, *(sequence(21) for _ in range(4)))
    assert [chunk.seq for chunk in step(s)] == [first]
    assert [(c.seq, c.start, c.length) for c in step(s)] == [(first, 21, 1), *((seq, 20, 1) for seq in others)]
    assert len({seq.blocks[4] for seq in others}) == 1
    assert len({seq.blocks[5] for seq in (first, *others)}) == 4


def test_who_waits_for_a_prefix_holds_up_nobody_and_is_not_forgotten() -> None:
    s = scheduler(step_tokens=64)
    first, same, other = added(s, sequence(21), sequence(21), sequence(21, first=100))
    assert [chunk.seq for chunk in s.schedule()] == [first, other]
    s.abort(first)  # nobody will publish the prefix now
    assert same in [chunk.seq for chunk in s.schedule()]


def test_slots_are_distinct_and_used_again() -> None:
    s = scheduler(max_sequences=3)
    sequences = added(s, *(sequence(2, max_tokens=2, first=10 * i) for i in range(7)))
    slots: dict[Sequence, int] = {}
    while not s.idle:
        chunks = s.schedule()
        now = {chunk.seq: chunk.seq.slot for chunk in chunks}
        assert len(set(now.values())) == len(now)
        assert all(slots.setdefault(seq, slot) == slot for seq, slot in now.items())
        s.commit(chunks, [1] * len(chunks))
    assert set(slots) == set(sequences)
    assert set(slots.values()) == {0, 1, 2}


def test_many_aborts_leave_nothing_behind() -> None:
    s = scheduler(max_sequences=1)
    for _ in range(1000):
        (seq,) = added(s, sequence(2, deadline=1e9))
        s.abort(seq)
    assert len(s._waiting._entries) < 100
    assert len(s._deadlines._entries) < 100


def test_prompts_keep_to_their_part_of_a_step_and_other_tokens_do_not_count() -> None:
    s = scheduler()
    decodes = added(s, *(sequence(1, 100, first=i) for i in range(3)))
    step(s)
    s.prefill_budget = 2
    (long,) = added(s, sequence(5, 100, first=50))
    assert [[(chunk.seq, chunk.length) for chunk in step(s)] for _ in range(3)] == [
        [*((seq, 1) for seq in decodes), (long, length)] for length in (2, 2, 1)
    ]
    added(s, *(sequence(2, 100, first=60 + 3 * i) for i in range(2)))
    assert [chunk.length for chunk in step(s)] == [1, 1, 1, 1, 2]
    assert [chunk.length for chunk in step(s)] == [1, 1, 1, 1, 1, 2]
