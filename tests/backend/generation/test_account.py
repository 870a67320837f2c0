"""Account: what a tally says after steps, ends and restarts, with real schedulers and without ranks."""

from array import array

import pytest

from backend.generation.account import Account
from backend.generation.blocks import BlockPool
from backend.generation.completion import Completion
from backend.generation.scheduler import Scheduler
from backend.generation.sequence import SamplingParams, Sequence
from backend.generation.stream import Stream


class Books:
    """As much of an engine as an account sees."""

    def __init__(self, account, blocks=64):
        self.account, self.scheduler, self.open = account, Scheduler(BlockPool(blocks, 4), 8, 64), {}
        account.opened()

    def add(self, *prompt, new=6):
        seq = Sequence(array("i", prompt), SamplingParams(max_tokens=new))
        self.open[seq.arrival] = Completion(seq, Stream(1, lambda ended: None), 0, None)
        self.scheduler.add(seq)

    def step(self):
        chunks = self.scheduler.schedule()
        self.account.sent(chunks, sum(chunk.length for chunk in chunks), self.open)
        for seq, _, _ in self.scheduler.commit(chunks, [5] * sum(chunk.samples for chunk in chunks)):
            completion = self.open[seq.arrival]
            if not completion.first:
                self.account.first(completion)
            if seq.finish_reason:
                self.account.last(completion)
        self.account.turn(self.scheduler)

    def finish(self):
        while not self.scheduler.idle:
            self.step()


@pytest.fixture
def account():
    return Account()


def test_a_sequence_counts_its_prompt_once_and_each_of_its_times(account):
    books = Books(account)
    books.add(1, 2, 3)
    books.add(4, 5, new=1)
    books.step()
    tally = account.tally
    assert (tally.running, tally.waiting, tally.tokens, tally.steps) == (1, 0, 5, 1)
    assert tally.kv_usage == 1 / 64
    books.finish()
    assert (tally.running, tally.prompt_tokens, tally.kv_usage) == (0, 5, 0)
    assert [len(each) for each in (tally.queue, tally.first_token, tally.latency, tally.token)] == [2, 2, 2, 1]
    assert tally.finished["length"] == 2
    assert 0 < tally.queue[0] <= tally.first_token[0] <= tally.latency[-1]


def test_a_preempted_sequence_began_once(account):
    books = Books(account, blocks=6)
    for first in (1, 20, 40):
        books.add(*range(first, first + 6), new=10)
    books.finish()
    assert account.tally.preemptions > 0
    assert len(account.tally.queue) == len(account.tally.latency) == 3


def test_what_earlier_ranks_counted_stays(account):
    tally, said = account.tally, []
    for _ in range(2):
        books = Books(account, blocks=6)
        for _ in range(3):
            books.add(*range(8), new=10)
        books.finish()
        said.append((tally.preemptions, tally.prefix_queries, tally.prefix_hits))
    assert all(count > 0 for count in said[0])
    assert said[1] == tuple(2 * count for count in said[0])
