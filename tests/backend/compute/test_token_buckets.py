"""Buckets hold what they are made for, with little to fill them up."""

import numpy as np
import pytest

from backend.compute.encoders.buckets import Bucket, usual


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
