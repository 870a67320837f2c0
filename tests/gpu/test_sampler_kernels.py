"""The drawing kernels choose as the sampler's torch operations do: settings mixed, ties, broken rows, any cut.

They need CUDA. TRITON_INTERPRET=1 runs most of them on CPU, where OpenAI Triton is installed.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backend.compute.sampler import BROKEN, Sampler
from backend.compute.sampling.parameters import parameters
from backend.generation.plan import Sampling

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = 5 if INTERPRETED else 40
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [
        pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # the interpreter's own
        pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy's, of broken rows
        pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    ]
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
from backend.compute.sampling.draw import Shape, draw, shape  # noqa: E402

ALONE = Shape(512, 256, 0, last_block=512, last_warps=4)
"""No rounds but the last kernel's own."""
MIXED: dict[str, tuple[float, ...]] = {
    "temperature": (0.0, 0.3, 0.8, 1.0, 2.5),
    "top_p": (1.0, 0.9, 0.5, 0.99),
    "top_k": (0, 1, 5, 40, 300, 100_000),
    "min_p": (0.0, 0.0, 0.05, 0.3),
}


def sampling(rows: int, seed: int = 0, **given: Any) -> Sampling:
    """Settings drawn from MIXED, or as given."""
    rng = np.random.default_rng(seed)
    drawn = {name: np.broadcast_to(given.get(name, rng.choice(choices, rows)), rows) for name, choices in MIXED.items()}
    floats = {name: values.astype(np.float32) for name, values in drawn.items()}
    ones, zeros = np.ones(rows, np.float32), np.zeros(rows, np.float32)
    return Sampling(
        temperature=floats["temperature"],
        top_p=floats["top_p"],
        top_k=drawn["top_k"].astype(np.int32),
        min_p=floats["min_p"],
        repetition_penalty=ones,
        frequency_penalty=zeros,
        presence_penalty=zeros,
        seeds=rng.integers(-(2**62), 2**62, rows),
        counters=rng.integers(0, 1000, rows),
        blocked=np.zeros((0, 2), np.int64),
        logprobs=True,
    )


def logits(rows: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * scale


def expected(values: Tensor, plan: Sampling) -> tuple[Tensor, Tensor]:
    """By the sampler on the CPU."""
    rows, width = values.shape
    ids, logprobs = Sampler(width, rows, "cpu").sample(values.float(), plan, np.arange(rows, dtype=np.int32))
    assert logprobs is not None
    return ids, logprobs


def found(values: Tensor, plan: Sampling, cut: Shape | None = None) -> tuple[list[int], Tensor]:
    words, on_device = torch.from_numpy(parameters(plan)).to(DEVICE), values.to(DEVICE)
    logprobs = torch.empty(len(values), device=DEVICE)
    ids = draw(on_device, words, logprobs, cut)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, draw(on_device, words, None, cut)), "asking for log-probabilities changes no token"
    return ids.tolist(), logprobs.cpu()


@pytest.mark.parametrize("cut", [None, Shape(256, 128, 1), ALONE], ids=["own", "one round", "alone"])
@pytest.mark.parametrize(("width", "scale"), [(1500, 1.0), (777, 3.0), (64, 8.0)])
def test_draws_are_those_of_the_cpu(width: int, scale: float, cut: Shape | None) -> None:
    values, plan = logits(ROWS, width, width, scale), sampling(ROWS, width)
    ids, logprobs = found(values, plan, cut)
    expected_ids, expected_logprobs = expected(values, plan)
    assert ids == expected_ids.tolist()
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [{"top_k": 7, "top_p": 1}, {"top_k": 0, "top_p": 0.3}, {"top_k": 200, "top_p": 0.6}])
def test_long_searches(given: dict[str, float]) -> None:
    """Flat rows, whose first draws are nearly all dropped."""
    values, plan = logits(ROWS, 700, 3, 0.02), sampling(ROWS, 3, temperature=1.0, min_p=0.0, **given)
    ids = expected(values, plan)[0].tolist()
    assert found(values, plan)[0] == ids
    assert found(values, plan, ALONE)[0] == ids


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits_with_many_ties(dtype: torch.dtype) -> None:
    values = (logits(ROWS, 900, 5) * 4).round().div(4).to(dtype)
    plan = sampling(ROWS, 5)
    assert found(values, plan)[0] == expected(values, plan)[0].tolist()


def test_ties_of_the_last_kept_token_are_kept() -> None:
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0]).expand(300, -1)
    for given, kept in (
        ({"top_k": 2}, {1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.6}, {1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.4}, {1}),
        ({"top_k": 4, "top_p": 0.0}, {1}),
        ({"min_p": 0.3}, {1, 2, 3, 4}),
    ):
        plan = sampling(36 if INTERPRETED else 300, **{"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0} | given)
        words = torch.from_numpy(parameters(plan)).to(DEVICE)
        ids = draw(row[: len(words)].to(DEVICE), words, cut=ALONE if INTERPRETED else None)
        assert set(ids.tolist()) == kept


def test_equal_zeros_of_both_signs() -> None:
    values = torch.zeros(8, 40)
    values[:, ::2] = -0.0
    for given in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}):
        plan = sampling(8, 2, **given)
        assert found(values, plan)[0] == expected(values, plan)[0].tolist()


def test_broken_rows_give_no_token_beside_whole_ones() -> None:
    values = logits(10, 300, 0)
    values[0, 7], values[1, 7], values[2] = torch.nan, torch.inf, -torch.inf
    values[3, 5:], values[4, 0], values[5, 9:] = -torch.inf, 3e38, -3e38
    values[6, 0], values[7, 0] = torch.nan, torch.inf
    for temperature in (0.0, 1.0) if INTERPRETED else (0.0, 1e-30, 1.0, 1e30):
        plan = sampling(10, 1, temperature=temperature, top_k=4, top_p=0.9)
        ids = found(values, plan)[0]
        assert [token == BROKEN for token in ids] == [row in (0, 1, 2, 6, 7) for row in range(10)]
        assert ids == expected(values, plan)[0].tolist()


def test_no_neighbour_and_no_cut_changes_a_row() -> None:
    values, plan = logits(ROWS, 1100, 6, 0.3), sampling(ROWS, 6, temperature=1.1)
    words = torch.from_numpy(parameters(plan)).to(DEVICE)
    together = draw(values.to(DEVICE), words).tolist()
    for row in range(3):
        one = values[row : row + 1].to(DEVICE), words[row : row + 1]
        for cut in (None, Shape(256, 256, 2), ALONE):
            assert draw(*one, cut=cut).tolist() == [together[row]]


def test_rows_may_lie_apart() -> None:
    wide, plan = logits(5, 700, 8).to(DEVICE), sampling(5, 8)
    words = torch.from_numpy(parameters(plan)).to(DEVICE)
    assert torch.equal(draw(wide[:, :500], words), draw(wide[:, :500].contiguous(), words))


def test_shape_covers_every_number_of_rows() -> None:
    for rows in (1, 8, 9, 256, 1024):
        assert shape(rows).span % shape(rows).block == 0


@pytest.mark.parametrize("cut", [None, ALONE], ids=["own", "alone"])
@pytest.mark.parametrize("bits", [0xFFC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001])
def test_rows_of_rubbish_read_nothing_beside_them(bits: int, cut: Shape | None) -> None:
    """As memory is that nothing has written yet, which graphs draw from while they are captured.

    As an integer, a number that is none and has a sign is below all numbers: it was looked for in vain, and then what
    was found was read 2 ** 31 places on, an illegal access.
    """
    values = logits(ROWS, 700, 9)
    values[::2] = torch.tensor(np.array([bits], np.uint32).view(np.float32))
    values[1, 0] = values[0, 0]
    ids, _ = found(values, sampling(ROWS, 9), cut)
    assert ids[::2] == [BROKEN] * len(ids[::2]) and ids[1] == BROKEN
    assert all(0 <= token < 700 for token in ids[3::2])


@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("rows", [1, 40])
def test_real_vocabulary(rows: int) -> None:
    for scale in (1.0, 4.0):
        values, plan = logits(rows, 128_256, rows, scale).bfloat16(), sampling(rows, rows)
        ids, logprobs = found(values, plan)
        expected_ids, expected_logprobs = expected(values, plan)
        assert ids == expected_ids.tolist()
        torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
def test_one_graph_serves_any_settings() -> None:
    static, words = torch.zeros(32, 5000, device=DEVICE), torch.zeros(32, 6, dtype=torch.int32, device=DEVICE)
    draw(static, words)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = draw(static, words)
    for seed, given in enumerate([{}, {"temperature": 0.0}, {"top_k": 5}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}]):
        values, plan = logits(32, 5000, seed, 0.5), sampling(32, seed, **given)
        static.copy_(values)
        words.copy_(torch.from_numpy(parameters(plan)))
        graph.replay()
        assert ids.tolist() == expected(values, plan)[0].tolist()
