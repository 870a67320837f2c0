"""A capture that CUDA refuses leaves torch as it was: random numbers, the stream, memory, earlier and later graphs."""

from __future__ import annotations

import pytest
import torch

from backend.compute.capture import capturing
from backend.compute.encoders.graphs import Capture
from backend.compute.graphs import captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]


def test_after_a_refused_capture_all_goes_on() -> None:
    values, pool, stream = torch.ones(3, device="cuda"), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    before, doubled = captured(lambda: values * 2, pool)
    for _ in range(2):
        with pytest.raises(RuntimeError), capturing(torch.cuda.CUDAGraph(), pool):
            values.sum().item()
    assert torch.cuda.current_stream() == stream
    assert torch.rand(4, device="cuda").unique().numel() > 1
    torch.cuda.empty_cache()
    assert torch.ones(2, pin_memory=True).sum() == 2
    after, tripled = captured(lambda: values * 3, pool)
    values.fill_(5)
    before.replay()
    assert doubled.tolist() == [10, 10, 10]
    after.replay()
    assert tripled.tolist() == [15, 15, 15]


def test_on_a_stream_of_the_callers() -> None:
    """As the graphs of encoders are captured."""
    values, found, capture = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), Capture()
    with pytest.raises(RuntimeError):
        capture(lambda: found.fill_(values.sum().item()))
    torch.rand(4, device="cuda")
    replay = capture(lambda: found.copy_(values * 2))
    values.fill_(5)
    replay()
    assert found.tolist() == [10, 10, 10]


def test_what_fails_without_cuda_is_the_callers_error() -> None:
    pool = torch.cuda.graph_pool_handle()
    with pytest.raises(ValueError, match="own"), capturing(torch.cuda.CUDAGraph(), pool):
        raise ValueError("own")
    torch.rand(4, device="cuda")
