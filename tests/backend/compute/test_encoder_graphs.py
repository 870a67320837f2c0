"""Buckets, what fills them up, and which graphs there are; repeating a function stands for replaying a graph."""

import logging

import numpy as np
import pytest
import torch

from backend.compute import encoder_graphs
from backend.compute.encoder_graphs import Bucket, StackGraphs, agree, usual


def lengths_of(seed, most=512):
    chance = np.random.default_rng(seed)
    return np.clip(chance.lognormal(3.8, 0.8, chance.integers(1, 400)), 1, most).astype(np.int64)


@pytest.mark.parametrize("seed", range(40))
def test_every_batch_fits_its_bucket(seed):
    lengths = lengths_of(seed)
    bucket = Bucket.of(lengths)
    starts = bucket.starts(lengths)
    made = np.diff(starts)
    assert starts.dtype == np.int32 and len(made) == bucket.sequences and starts[-1] == bucket.tokens
    np.testing.assert_array_equal(made[: len(lengths)], lengths)
    assert made.min() >= 0 and made.max() <= bucket.longest


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1024, 1025, 2049, 4095, 8193, 9000, 16383, 16384])
def test_little_is_filled_up(tokens):
    bucket = Bucket.of(np.array([tokens]))
    assert bucket.tokens >= tokens and bucket.tokens - tokens < max(128, tokens / 8)


def test_few_buckets():
    """As many as can be captured in a second or two, for all that a service may cut."""
    found = {Bucket.of(np.array([length] * count)) for length in range(1, 513) for count in (1, 8, 16384 // length)}
    assert len({bucket.tokens for bucket in found}) < 60 and {bucket.longest for bucket in found} == {128, 256, 512}


@pytest.mark.parametrize("most", [512, 2048, 16384])
def test_what_full_micro_batches_usually_fall_into(most):
    found = usual(most, 512)
    assert len(found) == len({*found}) <= 40 and found[0].tokens == most
    for length in (20, 50, 70, 100, 200, 300, 500):
        lengths = np.full(most // length, length)
        assert Bucket.of(lengths) in found, length
    assert Bucket.of(np.array([20])) in usual(most, 128)
    assert max(bucket.longest for bucket in usual(most, 64)) == 128


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
