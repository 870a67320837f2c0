"""Distributions on fixed seeds, each setting against its formula and against transformers, and who may not matter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from backend.compute.sampler import BROKEN, Sampler, bits, gumbel, row_keys
from backend.compute.sampling.parameters import WORDS, lay_out, parameters
from backend.generation.plan import History, Sampling

stats = pytest.importorskip("scipy").stats


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sampling(rows: int, logprobs: bool = False, blocked: Any = (), **given: Any) -> Sampling:
    def floats(name: str, default: float) -> np.ndarray:
        return np.full(rows, given.get(name, default), dtype=np.float32)

    return Sampling(
        temperature=floats("temperature", 1),
        top_p=floats("top_p", 1),
        top_k=np.full(rows, given.get("top_k", 0), dtype=np.int32),
        min_p=floats("min_p", 0),
        repetition_penalty=floats("repetition_penalty", 1),
        frequency_penalty=floats("frequency_penalty", 0),
        presence_penalty=floats("presence_penalty", 0),
        seeds=np.full(rows, given.get("seeds", 0), dtype=np.int64),
        counters=np.full(rows, given.get("counters", 0), dtype=np.int64),
        blocked=np.asarray(blocked, dtype=np.int64).reshape(-1, 2),
        logprobs=logprobs,
    )


def slots(rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.int32)


def history(slot: int, prompt: list[int], completion: list[int]) -> History:
    return History(slot, np.array(prompt, dtype=np.int32), np.array(completion, dtype=np.int32))


def draw(row: torch.Tensor, rows: int, **given: Any) -> np.ndarray:
    """Ids drawn from one row of logits under `rows` seeds."""
    sampler = Sampler(len(row), rows, "cpu")
    ids, _ = sampler.sample(row.expand(rows, -1), sampling(rows, seeds=np.arange(rows), **given), slots(rows))
    return ids.numpy()


def kept(row: torch.Tensor, **given: Any) -> set[int]:
    """The ids that top_k, top_p and min_p leave of one row."""
    plan = sampling(1, **given)
    scores = (row - row.max())[None] / plan.temperature[0]
    left = Sampler(len(row), 1, "cpu")._filtered(scores, plan.top_k, plan.top_p, plan.min_p)
    return set(torch.isfinite(left[0]).nonzero()[:, 0].tolist())


def chi_square(ids: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the ids' counts; classes rarer than five expected are taken together."""
    counts, expected = np.bincount(ids, minlength=len(probabilities)), probabilities * len(ids)
    assert not counts[probabilities == 0].any(), "a token of probability 0 was drawn"
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    some = expected > 0
    return float(stats.chisquare(counts[some], expected[some]).pvalue)


# --- the distribution


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(given: dict[str, float]) -> None:
    row = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2
    probabilities = reference(row, **given).double().softmax(-1)[0].numpy()
    assert chi_square(draw(row, 30_000, **given), probabilities) > 1e-3


def reference(row: torch.Tensor, **given: Any) -> torch.Tensor:
    """transformers' own warpers, in its order."""
    scores, ids = row[None].float(), torch.zeros(1, 0, dtype=torch.long)
    for name, warper in (
        ("temperature", hf.TemperatureLogitsWarper),
        ("top_k", hf.TopKLogitsWarper),
        ("top_p", hf.TopPLogitsWarper),
        ("min_p", hf.MinPLogitsWarper),
    ):
        if name in given:
            scores = warper(given[name])(ids, scores)
    return scores


def test_rare_tokens_are_drawn_at_their_rate() -> None:
    """Half the probability is spread over 50,000 tokens of 1e-5 each: coarse noise would miss or prefer them."""
    row = torch.full((50_001,), float(np.log(1e-5)))
    row[0] = float(np.log(0.5))
    ids = draw(row, 400)
    assert stats.binomtest(int((ids == 0).sum()), 400, 0.5).pvalue > 1e-3
    assert len(set(ids[ids > 0])) > 0.95 * (ids > 0).sum()


def test_one_possible_token_is_chosen_whatever_its_noise() -> None:
    row = torch.full((1000,), -torch.inf)
    row[417] = -3.0
    assert (draw(row, 2000) == 417).all()
    row = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    assert (draw(row, 200, top_k=1) == int(row.argmax())).all()


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.integers(0, 70),
    st.integers(1, 20).map(lambda twentieths: twentieths / 20),
    st.integers(0, 20).map(lambda twentieths: twentieths / 20),
)
def test_kept_tokens_equal_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 3
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    theirs = {name: value for name, value in given.items() if value}
    theirs = {name: value for name, value in theirs.items() if (name, value) != ("top_p", 1.0)}
    left = reference(row, **theirs)[0]
    assert kept(row, **given) == set(torch.isfinite(left).nonzero()[:, 0].tolist())


def test_ties_of_the_last_kept_token_are_kept() -> None:
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert kept(row, top_k=2) == {1, 2, 3, 4}
    assert kept(row, top_k=3, top_p=0.6) == {1, 2, 3, 4}
    assert kept(row, top_k=2, top_p=0.4) == {1}


def test_filters_of_a_row_do_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(5)).bfloat16().float()
    plan = sampling(4, top_k=[0, 10, 0, 290], top_p=[1, 0.9, 0.5, 0.99], min_p=[0, 0, 0.01, 0])
    together = Sampler(300, 4, "cpu")._filtered(logits - logits.amax(1, True), plan.top_k, plan.top_p, plan.min_p)
    for row in range(4):
        alone = kept(logits[row], top_k=plan.top_k[row], top_p=plan.top_p[row], min_p=plan.min_p[row])
        assert set(torch.isfinite(together[row]).nonzero()[:, 0].tolist()) == alone


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 1e4
    assert (draw(row, 50, temperature=temperature) == int(row.argmax())).all()


# --- penalties and blocked ids

PROMPT, COMPLETION = [3, 3, 5, 9], [5, 7, 7, 7, 1]


def adjusted(row: torch.Tensor, prompt: list[int], completion: list[int], **given: Any) -> np.ndarray:
    sampler = Sampler(len(row), 3, "cpu")
    sampler._counts.restart(history(2, prompt, completion))
    return sampler._adjusted(row[None], sampling(1, **given), np.array([2])).numpy()[0]


def test_repetition_penalty_is_that_of_transformers() -> None:
    row = torch.randn(12, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([PROMPT + COMPLETION])
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(ids, row[None].clone())[0].numpy()
    np.testing.assert_allclose(adjusted(row, PROMPT, COMPLETION, repetition_penalty=1.3), expected, rtol=1e-6)


def test_frequency_and_presence_count_the_completion_only() -> None:
    row = torch.randn(12, generator=torch.Generator().manual_seed(0))
    expected = row.numpy().copy()
    for token in set(COMPLETION):
        expected[token] -= 0.4 * COMPLETION.count(token) + 1.5
    found = adjusted(row, PROMPT, COMPLETION, frequency_penalty=0.4, presence_penalty=1.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_penalties_together_repetition_first() -> None:
    row = torch.randn(12, generator=torch.Generator().manual_seed(4))
    expected = row.double().numpy().copy()
    for token in {*PROMPT, *COMPLETION}:
        expected[token] = expected[token] * 2 if expected[token] < 0 else expected[token] / 2
        if token in COMPLETION:
            expected[token] -= -0.5 * COMPLETION.count(token) + 0.25
    found = adjusted(row, PROMPT, COMPLETION, repetition_penalty=2.0, frequency_penalty=-0.5, presence_penalty=0.25)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_counts_grow_with_the_sampled_tokens_as_from_a_history() -> None:
    """Five steps under penalties choose the same tokens as five samplers that are told the history each time."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(8))
    plan = sampling(1, temperature=0, frequency_penalty=1.0, repetition_penalty=1.2)
    lasting, completion = Sampler(40, 4, "cpu"), list[int]()
    for step in range(5):
        told = Sampler(40, 4, "cpu")
        expected, _ = told.sample(logits[:1], plan, slots(1), [history(0, [1, 2], completion)])
        first = [history(3, [1, 2], [])] if step == 0 else []
        found, _ = lasting.sample(logits[:1], plan, np.array([3], dtype=np.int32), first)
        assert found.tolist() == expected.tolist()
        completion.append(int(found[0]))
    assert len(set(completion)) == 5


def test_a_slot_starts_afresh_with_its_next_sequence() -> None:
    row, plan = torch.tensor([[0.0, 5.0, 4.9]]), sampling(1, temperature=0, presence_penalty=1.0)
    sampler = Sampler(3, 1, "cpu")
    assert sampler.sample(row, plan, slots(1), [history(0, [], [])])[0].tolist() == [1]
    assert sampler.sample(row, plan, slots(1))[0].tolist() == [2]
    assert sampler.sample(row, plan, slots(1), [history(0, [1], [])])[0].tolist() == [1]


def test_neighbours_without_penalties_keep_their_logits() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(2))
    sampler = Sampler(30, 3, "cpu")
    sampler._counts.restart(history(0, [1], [2, 3]))
    scores = sampler._adjusted(logits, sampling(3, presence_penalty=[0, 1, 0]), slots(3))
    assert torch.equal(scores[[0, 2]], logits[[0, 2]])


def test_counts_are_allocated_at_their_first_use() -> None:
    sampler = Sampler(10, 2, "cpu")
    sampler.sample(torch.randn(2, 10), sampling(2), slots(2))
    assert not sampler._counts.allocated
    sampler.sample(torch.randn(2, 10), sampling(2, presence_penalty=[0, 1]), slots(2))
    assert sampler._counts.allocated


def test_blocked_ids_are_never_chosen() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 1.0, 2.0]])
    plan = sampling(2, temperature=[0, 0], blocked=[(0, 0), (0, 2)])
    assert Sampler(3, 2, "cpu").sample(logits, plan, slots(2))[0].tolist() == [1, 0]
    drawn = draw(logits[0], 500, blocked=[(row, token) for row in range(500) for token in (0, 3, 9999)])
    assert set(drawn.tolist()) == {1, 2}


def test_the_logits_are_left_as_they_were() -> None:
    logits = torch.randn(2, 20)
    before = logits.clone()
    plan = sampling(2, top_k=3, top_p=0.5, min_p=0.1, presence_penalty=1, blocked=[(0, 1)], logprobs=True)
    Sampler(20, 2, "cpu").sample(logits, plan, slots(2))
    assert torch.equal(logits, before)


# --- greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_lowest_of_the_most_likely(dtype: torch.dtype) -> None:
    logits = torch.randint(0, 5, (50, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    ids, _ = Sampler(64, 50, "cpu").sample(logits, sampling(50, temperature=0), slots(50))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_greedy_rows_stay_greedy_beside_others() -> None:
    logits = torch.randn(100, 50, generator=torch.Generator().manual_seed(0)) * 0.1
    temperature = np.where(np.arange(100) % 3 == 0, 0, 1.5)
    plan = sampling(100, temperature=temperature, top_k=7, seeds=np.arange(100))
    ids = Sampler(50, 100, "cpu").sample(logits, plan, slots(100))[0]
    greedy = torch.from_numpy(temperature == 0)
    assert torch.equal(ids[greedy], logits[greedy].argmax(-1))
    assert (ids[~greedy] != logits[~greedy].argmax(-1)).float().mean() > 0.5


# --- seeds


def test_seed_and_counter_fix_the_draw_whatever_the_batch_slot_and_order() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 500, generator=generator)
    given: dict[str, Any] = {
        "temperature": np.linspace(0.2, 2, 40),
        "top_k": np.arange(40) % 4 * 30,
        "top_p": 1 - np.arange(40) % 3 * 0.1,
        "seeds": np.arange(40) - 20,
        "counters": np.arange(40) % 7,
    }
    together = Sampler(500, 40, "cpu").sample(logits, sampling(40, **given), slots(40))[0]
    order = np.random.default_rng(0).permutation(40)
    shuffled = sampling(40, **{name: values[order] for name, values in given.items()})
    slot = np.random.default_rng(1).permutation(64)[:40].astype(np.int32)
    assert torch.equal(Sampler(500, 64, "cpu").sample(logits[order], shuffled, slot)[0], together[order])
    for row in range(40):
        alone = sampling(1, **{name: values[row] for name, values in given.items()})
        assert Sampler(500, 1, "cpu").sample(logits[row : row + 1], alone, slots(1))[0] == together[row]


def test_another_seed_or_counter_is_another_draw() -> None:
    row = torch.zeros(1, 1000)
    sampler = Sampler(1000, 1, "cpu")
    ids = [
        int(sampler.sample(row, sampling(1, seeds=seed, counters=counter), slots(1))[0])
        for seed in (0, 1, 2**63 - 1, -(2**63), -1, 1 << 32)
        for counter in range(8)
    ]
    assert len(set(ids)) > 40


# --- log-probabilities, broken logits


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(20, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    plan = sampling(20, temperature=1.4, top_k=9, presence_penalty=2, blocked=[(0, 0)], seeds=range(20), logprobs=True)
    ids, logprobs = Sampler(70, 20, "cpu").sample(logits, plan, slots(20))
    expected = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert logprobs is not None and logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_no_logprobs_unless_asked_for() -> None:
    assert Sampler(5, 1, "cpu").sample(torch.zeros(1, 5), sampling(1), slots(1))[1] is None


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, None])
def test_broken_logits_give_no_token(value: float | None, temperature: float) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    if value is None:
        logits[1] = -torch.inf
    else:
        logits[1, 7] = value
    plan = sampling(3, temperature=temperature, top_k=5, presence_penalty=[0, 1, 0], logprobs=True)
    ids = Sampler(20, 3, "cpu").sample(logits, plan, slots(3))[0].tolist()
    assert ids[1] == BROKEN and ids[0] >= 0 and ids[2] >= 0


def test_all_ids_blocked_give_no_token() -> None:
    plan = sampling(1, blocked=[(0, token) for token in range(4)])
    assert Sampler(4, 1, "cpu").sample(torch.zeros(1, 4), plan, slots(1))[0].tolist() == [BROKEN]


# --- the random numbers


def numbers(seeds: np.ndarray, counters: np.ndarray, vocab_size: int) -> np.ndarray:
    keys = torch.from_numpy(row_keys(seeds, counters)[:, :, None])
    return bits(keys[0], keys[1], torch.arange(vocab_size, dtype=torch.int32)).numpy()


CONSECUTIVE = [
    (np.arange(2000), np.zeros(2000, dtype=np.int64)),  # seeds
    (np.full(2000, 42), np.arange(2000)),  # counters
    (np.arange(2000) << 40, np.arange(2000)),  # both
]


@pytest.mark.parametrize(("seeds", "counters"), CONSECUTIVE, ids=["seeds", "counters", "both"])
def test_random_bits_are_uniform_and_independent(seeds: np.ndarray, counters: np.ndarray) -> None:
    found = numbers(seeds, counters, 500)
    assert found.min() >= 0
    for shift in (0, 10, 23):  # low, middle and high bits
        assert stats.chisquare(np.bincount((found >> shift & 255).ravel(), minlength=256)).pvalue > 1e-3
    for axis in (0, 1):  # neighbours in seed or counter, and in token id: all pairs of 4 bits equally often
        first, second = np.moveaxis(found, axis, 0)[:-1] >> 27, np.moveaxis(found, axis, 0)[1:] >> 27
        assert stats.chisquare(np.bincount((first * 16 + second).ravel(), minlength=256)).pvalue > 1e-3
    for column in (0, 1, 499):  # one token over the rows
        assert stats.chisquare(np.bincount(found[:, column] >> 25, minlength=64)).pvalue > 1e-3


def test_rows_do_not_share_numbers() -> None:
    found = numbers(np.arange(300), np.zeros(300, dtype=np.int64), 500)
    assert len(np.unique(found)) > 0.9999 * found.size
    correlation = np.corrcoef(found.astype(np.float64))
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 6 / np.sqrt(500)


def test_noise_is_gumbel_and_finite() -> None:
    keys = torch.from_numpy(row_keys(np.arange(40), np.zeros(40, dtype=np.int64))[:, :, None])
    noise = gumbel(keys[0], keys[1], torch.arange(5000, dtype=torch.int32))
    assert torch.isfinite(noise).all()
    assert stats.kstest(noise.numpy().ravel()[::4], "gumbel_r").pvalue > 1e-3


# --- the parameters of a graph


def test_parameters_are_the_settings_bit_for_bit() -> None:
    plan = sampling(
        3,
        temperature=[0, 0.7, 1],
        top_p=[1, 0.9, 0.5],
        min_p=[0, 0.1, 1],
        top_k=[0, 5, 9],
        seeds=[1, -2, 3],
        counters=7,
    )
    words = parameters(plan, 5)
    floats = words[:, :3].view(np.float32)
    assert words.shape == (5, WORDS) and not words[3:].any()
    np.testing.assert_array_equal(floats[:3, 0], plan.temperature)
    np.testing.assert_array_equal(floats[:3, 1], plan.top_p)
    np.testing.assert_array_equal(floats[:3, 2], np.array([-np.inf, np.log(np.float32(0.1)), 0], np.float32))
    np.testing.assert_array_equal(words[:3, 3], plan.top_k)
    np.testing.assert_array_equal(words[:3, 4:].T, row_keys(plan.seeds, plan.counters))


def test_parameters_laid_out_again_leave_nothing_of_the_step_before() -> None:
    words = parameters(sampling(4, top_k=3))
    lay_out(words, sampling(2, seeds=5))
    np.testing.assert_array_equal(words, parameters(sampling(2, seeds=5), 4))


# --- devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_chooses_as_the_cpu_without_waiting() -> None:
    rows, vocab_size = 64, 5000
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 2
    plan = sampling(
        rows, temperature=np.arange(rows) % 3 * 0.6, top_k=np.arange(rows) % 4 * 25,
        top_p=1 - np.arange(rows) % 2 * 0.1,
        min_p=np.arange(rows) % 5 * 0.01, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1,
        seeds=np.arange(rows), counters=np.arange(rows), blocked=[(0, 1), (5, 7)], logprobs=True,
    )  # fmt: skip
    told = [history(slot, [1, 2, slot], [slot, 7, 7]) for slot in range(rows)]
    expected = Sampler(vocab_size, rows, "cpu").sample(logits, plan, slots(rows), told)
    sampler, on_device = Sampler(vocab_size, rows, "cuda"), logits.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sampler.sample(on_device, plan, slots(rows), told)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found[0].cpu().tolist() == expected[0].tolist()
    assert found[1] is not None and expected[1] is not None
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-4, atol=1e-4)
