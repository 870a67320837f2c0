"""Which graphs there are and what they get; repeating a function stands for replaying a graph."""

import logging

import numpy as np
import torch

from backend.compute.all_reduce import agree
from backend.compute.encoders import graphs as encoder_graphs
from backend.compute.encoders.buckets import Bucket
from backend.compute.encoders.graphs import StackGraphs


class Doubling:
    """A stack that doubles its values, and what stands for capturing."""

    def __init__(self, most=1024):
        self.captured, self.broken = 0, ""
        self.graphs = StackGraphs(self.compute, most, self.capture)

    def compute(self, calls, values, spread):
        return values[0] * 2 + spread.longest

    def capture(self, compute):
        if self.broken:
            raise RuntimeError(self.broken)
        self.captured += 1
        return compute

    def run(self, lengths, value, calls=("calls",)):
        lengths = np.array(lengths)
        bucket, given = Bucket.of(lengths), torch.full((1, int(lengths.sum()), 4), float(value))

        def fill(buffers):
            buffers[0][:, : given.shape[1]] = given

        starts = torch.from_numpy(bucket.starts(lengths))
        found = self.graphs.run(bucket, [*calls], [given], starts, fill)
        return None if found is None else found[0, : given.shape[1], 0].unique().tolist()


def test_the_second_of_a_bucket_is_captured():
    stack = Doubling()
    assert stack.run([5, 9], 1) is None
    assert stack.run([7, 7], 2) == [132.0] and stack.captured == 1  # the same bucket
    assert stack.run([14], 3) == [134.0] and stack.captured == 1
    assert stack.run([200], 3) is None


def test_what_is_prepared_is_there_at_its_first_use():
    stack = Doubling()
    bucket = Bucket.of(np.array([100, 100]))
    stack.graphs.prepare([bucket])
    assert stack.captured == 0  # nothing is known of the values yet
    stack.run([5], 1), stack.run([5], 1)
    stack.graphs.prepare([bucket, bucket, Bucket(4096, 128, 64)])
    assert stack.captured == 2 and stack.run([100, 100], 4) == [8 + 128.0] and stack.captured == 2


def test_other_calls_and_larger_batches_are_left_to_the_caller():
    stack = Doubling(most=300)
    assert [stack.run([5], 1), stack.run([5], 1)] == [None, [130.0]]
    assert stack.run([5], 1, calls=("others",)) is None
    assert [stack.run([500], 1), stack.run([500], 1)] == [None, None]


def test_the_oldest_graph_goes(monkeypatch):
    monkeypatch.setattr(encoder_graphs, "MOST", 2)
    stack = Doubling()
    for tokens in (100, 200, 100, 300):  # 200 is the one not used for longest
        stack.run([tokens], 1), stack.run([tokens], 1)
    assert stack.graphs.count == 2 and stack.captured == 3
    stack.run([100], 1)
    assert stack.captured == 3
    assert stack.run([200], 5) == [10 + 256.0] and stack.captured == 4


def test_once_it_fails_no_more_is_captured_and_what_is_there_stays(caplog):
    stack = Doubling()
    for value in (1, 2):
        stack.run([5], value)
    stack.broken = "out of\nmemory"
    assert stack.run([200], 1) is None
    with caplog.at_level(logging.WARNING):
        assert stack.run([200], 1) == [2 + 256.0]  # computed, not captured
    assert stack.graphs.failed == "out of memory" and "out of memory" in caplog.text
    assert stack.run([200], 1) is None and stack.run([5], 3) == [6 + 128.0]


def test_a_graph_that_another_rank_lacks_is_not_kept():
    stack = Doubling()
    stack.graphs = StackGraphs(stack.compute, 1024, stack.capture, lambda could: False)
    for _ in range(2):
        stack.run([5], 1)
    assert stack.captured == 1 and stack.graphs.count == 0 and stack.graphs.failed


def test_one_rank_agrees_with_itself():
    assert agree(1, torch.device("cpu"), True) and not agree(1, torch.device("cpu"), False)
