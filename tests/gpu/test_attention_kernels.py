"""The kernels equal reference.py in float32 on fresh random inputs: dtypes, head sizes, groups, windows, caps, sinks.

They need CUDA. TRITON_INTERPRET=1 runs most of them on CPU, where OpenAI Triton is installed.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from backend.compute.attention import reference
from backend.compute.attention.base import Rule
from backend.compute.attention.step import Step
from backend.compute.cache import FP8, KVCache, LayerSpec, rounded
from backend.compute.decoder import decode
from backend.compute.graphs import Inputs
from backend.generation.plan import Plan

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
from backend.compute.attention import decode as decoding  # noqa: E402
from backend.compute.attention import kernels  # noqa: E402
from backend.compute.attention import split as splitting  # noqa: E402
from backend.compute.attention.tiles import columns_of  # noqa: E402

ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
"""Largest error allowed, relative to the largest magnitude of the result."""
if INTERPRETED:
    del ERROR[torch.bfloat16]  # the interpreter of OpenAI Triton 3.6 multiplies the bit patterns of bfloat16
SHORT = [(1, 0), (5, 0), (37, 0), (1, 60), (1, 0), (16, 16), (3, 45), (1, 15), (30, 33)]
"""(tokens now, tokens before) of each chunk: prefill, continued prefill and decode in one step."""
DECODE = [(1, before) for before in (0, 1, 15, 16, 63, 64, 200, 31)]
LONG = [(1, 4000), (1, 300), (1, 2047), (1, 2048)]


def case(chunks: list[tuple[int, int]], block_size: int, seed: int) -> Plan:
    """A plan of these chunks over blocks in random order."""
    rng = random.Random(seed)
    counts, _befores = zip(*chunks, strict=True)
    needed = [-(-(count + before) // block_size) for count, before in chunks]
    blocks = rng.sample(range(sum(needed) + 3), sum(needed))
    tables = np.zeros((len(chunks), max(needed)), np.int32)
    slots = []
    for row, (count, before) in enumerate(chunks):
        tables[row, : needed[row]] = [blocks.pop() for _ in range(needed[row])]
        at = np.arange(before, before + count)
        slots.append(tables[row, at // block_size].astype(np.int64) * block_size + at % block_size)
    none: Any = None
    return Plan(
        input_ids=none,
        positions=none,
        kv_slots=np.concatenate(slots),
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        kv_lengths=np.array([count + before for count, before in chunks], np.int32),
        block_tables=tables,
        slots=none,
        rows=none,
        sampling=none,
    )


def decoded(plan: Plan) -> Plan:
    """The plan of one token a chunk, with all that a whole decode step has besides."""
    usual = decode(len(plan.kv_lengths))
    return replace(usual, kv_slots=plan.kv_slots, kv_lengths=plan.kv_lengths, block_tables=plan.block_tables)


def alike(cache: KVCache, expected: torch.Tensor) -> torch.Tensor:
    """A layer of the cache in float32, which must be as expected."""
    kept = cache.layers[0].float()
    same = int((kept == expected).sum()) / kept.numel()  # a mean on CUDA multiplies by 1 / n, which may miss 1
    # OpenAI Triton 3.6's interpreter halves a float8 that rounds up to a power of two.
    assert same > 0.9 if INTERPRETED and cache.dtype == FP8 else same == 1
    return kept


class Fixture:
    """Random queries, keys, values and cache; the same for the kernel, and in float32 for the reference."""

    def __init__(
        self,
        chunks: list[tuple[int, int]],
        dtype: torch.dtype,
        dim: int,
        heads: int,
        kv_heads: int,
        block_size: int = 16,
        seed: int = 0,
        kept: torch.dtype | None = None,
    ) -> None:
        """`kept`: the cache's type, where it is not the queries'."""
        self.plan = case(chunks, block_size, seed)
        blocks = int(self.plan.block_tables.max()) + 1
        generator = torch.Generator().manual_seed(seed)
        tokens = int(self.plan.query_starts[-1])
        shapes = ((heads, tokens, dim), (kv_heads, tokens, dim), (kv_heads, tokens, dim))
        self.inputs = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
        self.sinks = (torch.randn(heads, generator=generator) * 3).to(DEVICE, dtype)
        self.cache = KVCache([LayerSpec(kv_heads, dim)], blocks, block_size, kept or dtype, DEVICE)
        self.exact = KVCache([LayerSpec(kv_heads, dim)], blocks, block_size, torch.float32, DEVICE)
        self.cache.layers[0].copy_(torch.randn(self.cache.layers[0].shape, generator=generator))
        self.exact.layers[0].copy_(self.cache.layers[0])

    def check(self, rule: Rule) -> None:
        """A decode step by both kernels that could serve it."""
        step = Step.from_plan(self.plan, DEVICE, self.cache)
        exact = Step.from_plan(self.plan, DEVICE, self.exact)
        query, *new = (x.float() for x in self.inputs)
        reference.attend(query, *(rounded(x, self.cache.dtype).float() for x in new), 0, exact, rule)
        kernels.attend(*self.inputs, 0, step, rule)
        self.exact.layers[0].copy_(alike(self.cache, self.exact.layers[0]))
        expected = reference.read(query.transpose(0, 1), 0, exact, rule)
        for count in (0, 8) if step.decode else (0,):
            error = (self.read(step, rule, count).float() - expected).abs().max() / expected.abs().max()
            assert error < ERROR[self.inputs[0].dtype], (count, float(error))

    def read(self, step: Step, rule: Rule, count: int) -> torch.Tensor:
        """By this many splits of each row, 0: the fixed grid."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "splits", lambda *_: count)
            result = kernels.read(self.inputs[0].transpose(0, 1), 0, step, rule)
        assert result.dtype == self.inputs[0].dtype
        return result

    def rules(self) -> list[Rule]:
        scale = self.inputs[0].shape[-1] ** -0.5
        return [
            Rule(scale),
            Rule(scale * 2, window=20),
            Rule(scale * 3, softcap=2.5),
            Rule(scale, sinks=self.sinks),
            Rule(scale, window=7, softcap=30.0, sinks=self.sinks),
        ]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("chunks", [SHORT, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("rule", range(5), ids=["plain", "window", "cap", "sinks", "all"])
def test_rules(dtype: torch.dtype, chunks: list[tuple[int, int]], rule: int) -> None:
    made = Fixture(chunks, dtype, 64, 6, 2, seed=rule)
    made.check(made.rules()[rule])


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("chunks", [SHORT, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("rule", range(5), ids=["plain", "window", "cap", "sinks", "all"])
def test_a_cache_of_float8(dtype: torch.dtype, chunks: list[tuple[int, int]], rule: int) -> None:
    """Read in the queries' type; what is beyond its range is kept as its largest value."""
    made = Fixture(chunks, dtype, 64, 6, 2, seed=rule, kept=FP8)
    made.inputs[2][:, 0, 0] = 1000.0
    made.check(made.rules()[rule])
    assert (made.cache.layers[0].float().abs().max() == 448) and not made.cache.layers[0].float().isnan().any()


HALF = [dtype for dtype in ERROR if dtype.itemsize == 2]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [32, 80, 96, 192])
def test_head_sizes_of_a_cache_of_float8(dtype: torch.dtype, dim: int) -> None:
    Fixture(DECODE, dtype, dim, 4, 2, 16, dim, FP8).check(Rule(dim**-0.5, window=33))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("up", [True, False])
def test_queries_of_any_size_over_a_cache_of_float8(dtype: torch.dtype, up: bool) -> None:
    """Beyond what float16 holds, in bfloat16: the kernels multiply in float16."""
    made = Fixture(DECODE, dtype, 64, 4, 2, kept=FP8)
    factor = 2.0 ** ((40 if dtype == torch.bfloat16 else 12) * (1 if up else -1))
    made.inputs[0] *= factor
    made.check(Rule(0.125 / factor))


def test_tiles_of_a_cache_of_float8_are_no_longer_than_those_of_the_queries_type() -> None:
    """Registers hold them in that type."""
    query, kv = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
    for wide in (64, 128, 256):
        assert columns_of(wide, query, kv.to(FP8), 16 << 10) == columns_of(wide, query, kv, 16 << 10)
    assert columns_of(128, query, kv.float(), 16 << 10) == 32


def test_roped_fills_a_cache_of_float8() -> None:
    """As the reference does, saturating."""
    generator = torch.Generator().manual_seed(3)
    qkv = (torch.randn(5, 10 * 64, generator=generator) * 200).to(DEVICE)
    angles = torch.randn(5, 64, generator=generator).to(DEVICE)
    slots = torch.tensor([3, 9, 40, 0, 17], device=DEVICE)
    found = []
    for module in ("reference", "kernels"):
        cache = KVCache([LayerSpec(2, 64)], 3, 16, FP8, DEVICE)
        roped = import_module(f"backend.compute.dense.{module}").roped
        found.append((roped(qkv, angles.cos(), angles.sin(), cache.layers[0], slots, 6, None, 0.0), cache.layers[0]))
    (query, kept), (query2, kept2) = found
    torch.testing.assert_close(query, query2)
    near = (kept.float() - kept2.float()).abs() <= kept.float().abs() / 8  # a value between two may fall to either
    assert near.float().mean() > (0.9 if INTERPRETED else 0.9999)  # see alike
    assert kept2.float().abs().max() == 448


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("scale", [0.125, 0.09, 128**-0.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing_of_a_tile(dtype: torch.dtype, scale: float, sinks: bool) -> None:
    """A window far smaller than a tile's rows: most see nothing of the first columns, some rows nothing until late.

    Several scales, since what a finite score for the unseen does to such rows depends on which way products round.
    """
    made = Fixture([(150, 70), (1, 200), (130, 0)], dtype, 64, 2, 2)
    for window in (1, 5, 40):
        made.check(Rule(scale, window, sinks=made.sinks if sinks else None))
    made.check(Rule(scale, 3, 30.0, made.sinks if sinks else None))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("chunks", [SHORT, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("dim", "block_size"), [(8, 16), (64, 1), (80, 16), (96, 32), (128, 16), (192, 7), (256, 16)])
def test_head_sizes(dtype: torch.dtype, chunks: list[tuple[int, int]], dim: int, block_size: int) -> None:
    Fixture(chunks, dtype, dim, 4, 2, block_size, dim).check(Rule(dim**-0.5, window=33))


@pytest.mark.parametrize("chunks", [SHORT, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (3, 1), (12, 12), (32, 8), (40, 8), (48, 1), (71, 1)])
def test_groups(chunks: list[tuple[int, int]], heads: int, kv_heads: int) -> None:
    made = Fixture(chunks, torch.float32, 32, heads, kv_heads)
    made.check(Rule(0.2, sinks=made.sinks))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("rule", range(5), ids=["plain", "window", "cap", "sinks", "all"])
def test_long_context_is_split(dtype: torch.dtype, rule: int) -> None:
    made = Fixture(LONG, dtype, 128, 4, 1, seed=rule)
    assert decoding.processors(torch.device(DEVICE)) * decoding.SHAPE.per_processor > 2 * len(LONG)
    made.check(made.rules()[rule])
    made.check(Rule(0.1, window=1000))


@pytest.mark.parametrize(
    ("processors", "heads", "kv_heads", "sinks"),
    [(1, 6, 2, True), (2, 5, 1, False), (3, 3, 3, True), (7, 6, 2, False), (20, 6, 2, True)],
)
def test_however_many_programs_share_the_work(
    processors: int, heads: int, kv_heads: int, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stretches that begin and end anywhere in a pair; the arrivals are 0 again for the next layer."""
    monkeypatch.setattr(decoding, "processors", lambda _: processors)
    for chunks in (DECODE, [*SHORT[:4], (1, 300)]):
        made = Fixture(chunks, torch.float32, 64, heads, kv_heads, seed=processors)
        for window in (0, 90):
            made.check(Rule(0.125, window, sinks=made.sinks if sinks else None))
        step = Step.from_plan(made.plan, DEVICE, made.cache)
        made.read(step, Rule(0.125), 0)
        assert not step.once(("arrivals", kv_heads), lambda: torch.ones(1)).any()


@pytest.mark.parametrize("count", [4, 64])
@pytest.mark.parametrize("window", [0, 16, 90])
def test_however_many_splits(count: int, window: int) -> None:
    """More than a row has tiles, and several tiles to a split, down to rows of one token."""
    for heads, kv_heads in ((6, 2), (5, 1)):
        made = Fixture([(1, 0), (1, 700), (1, 31), (1, 32)], torch.float32, 64, heads, kv_heads, seed=count)
        rule = Rule(0.125, window, sinks=made.sinks if heads == 6 else None)
        made.check(rule)
        step = Step.from_plan(made.plan, DEVICE, made.cache)
        expected, result = made.read(step, rule, 0), made.read(step, rule, count)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_splits_depend_on_rows_heads_and_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "processors", lambda _: 132)
    cache = KVCache([LayerSpec(8, 16)], 1, 16, torch.float32, DEVICE)
    for width in (1, 700):
        steps = {rows: Inputs(cache, rows, width, spare_slot=rows).step for rows in (1, 2, 4, 8, 16, 17, 256)}
        counts = {rows: splitting.splits(step, 8) for rows, step in steps.items()}
        assert counts == {1: 64, 2: 32, 4: 16, 8: 8, 16: 4, 17: 0, 256: 0}
    assert splitting.splits(steps[1], 1) == 64
    assert splitting.splits(Step.from_plan(case(SHORT, 16, 0), DEVICE, cache), 1) == 0


@pytest.mark.skipif(INTERPRETED, reason="long")
def test_long_prefill() -> None:
    Fixture([(2048, 0), (1, 3000), (1000, 5000), (1, 1)], torch.bfloat16, 128, 32, 8).check(Rule(0.09))
    Fixture([(2048, 0), (1, 3000), (1000, 5000)], torch.bfloat16, 256, 8, 4).check(Rule(0.06, 1024, 50.0))


def test_strided_inputs() -> None:
    made = Fixture(SHORT, torch.float32, 64, 6, 2)
    made.inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in made.inputs]
    made.check(Rule(0.125))
    made.inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made.inputs]
    made.check(Rule(0.125))


@pytest.mark.parametrize("chunks", [SHORT, DECODE], ids=["mixed", "decode"])
def test_read_alone(chunks: list[tuple[int, int]]) -> None:
    """With the keys and values in the cache already, queries as a slice of a wider tensor."""
    made = Fixture(chunks, torch.float32, 64, 6, 2)
    step = Step.from_plan(made.plan, DEVICE, made.cache)
    expected = kernels.attend(*made.inputs, 0, step, Rule(0.1, window=33))
    wide = torch.cat([made.inputs[0].transpose(0, 1), torch.ones(made.inputs[0].shape[1], 3, 64, device=DEVICE)], 1)
    assert torch.equal(kernels.read(wide[:, :6], 0, step, Rule(0.1, window=33)), expected)


def test_rubbish_of_earlier_owners_is_not_read() -> None:
    for chunks in (SHORT, DECODE):
        made = Fixture(chunks, torch.float32, 64, 6, 2)
        lengths, tables = made.plan.kv_lengths, made.plan.block_tables
        used = {int(tables[s, p // 16]) * 16 + p % 16 for s in range(len(lengths)) for p in range(lengths[s])}
        unused = [slot for slot in range(made.cache.scratch_slot) if slot not in used]
        for cache in (made.cache, made.exact):
            cache.tokens(0)[unused] = torch.nan
        step = Step.from_plan(made.plan, DEVICE, made.cache)
        expected = reference.attend(*made.inputs, 0, Step.from_plan(made.plan, DEVICE, made.exact), Rule(0.1))
        torch.testing.assert_close(kernels.attend(*made.inputs, 0, step, Rule(0.1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("processors", "count"), [(1, 0), (5, 0), (40, 0), (5, 4), (5, 64)])
@pytest.mark.parametrize("sinks", [False, True])
def test_padded_static_step(processors: int, count: int, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a sequence give zeros and write to scratch alone."""
    monkeypatch.setattr(decoding, "processors", lambda _: processors)
    monkeypatch.setattr(kernels, "splits", lambda *_: count)
    made = Fixture(DECODE, torch.float32, 64, 6, 2)
    rule = Rule(0.125, sinks=made.sinks if sinks else None)
    inputs = Inputs(made.cache, 16, 300, spare_slot=16)
    inputs.fill(decoded(made.plan))
    step = inputs.step
    before = made.cache.layers[0].clone()
    padded = [torch.cat([x, torch.randn_like(x)], 1) for x in made.inputs]
    result = kernels.attend(*padded, 0, step, rule)
    expected = reference.attend(*made.inputs, 0, Step.from_plan(made.plan, DEVICE, made.exact), rule)
    torch.testing.assert_close(result[:8], expected, rtol=1e-5, atol=1e-5)
    assert not result[8:].any()
    assert torch.equal(made.cache.layers[0][:-1], made.exact.layers[0][:-1])
    assert not torch.equal(made.cache.layers[0], before)


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("count", [0, 16])
def test_cuda_graph_follows_new_values(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured static step computes whatever plan is filled in later, however long its context."""
    dtype = torch.bfloat16
    monkeypatch.setattr(kernels, "splits", lambda *_: count)
    made = Fixture(LONG, dtype, 128, 32, 8)
    inputs = Inputs(made.cache, 8, 300, spare_slot=8)
    step = inputs.step
    static = [torch.zeros(x.shape[0], 8, 128, dtype=x.dtype, device=DEVICE) for x in made.inputs]
    kernels.attend(*static, 0, step, Rule(0.09))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernels.attend(*static, 0, step, Rule(0.09))
    for x, given in zip(static, made.inputs, strict=True):
        x[:, :4] = given
    inputs.fill(decoded(made.plan))
    graph.replay()
    expected = reference.attend(
        *(x.float() for x in made.inputs), 0, Step.from_plan(made.plan, DEVICE, made.exact), Rule(0.09)
    )
    error = (result[:4].float() - expected).abs().max() / expected.abs().max()
    assert error < ERROR[dtype]
