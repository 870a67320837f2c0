"""The dense kernels equal reference.py in float32 on fresh random inputs: dtypes, sizes, every optional part.

They need CUDA. TRITON_INTERPRET=1 runs most of them on CPU, where OpenAI Triton is installed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from backend.compute.dense import reference
from backend.compute.dense.base import ACTIVATIONS
from backend.compute.dense.shape import Shape, shape

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
from backend.compute.dense import kernels, small_linear  # noqa: E402

ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
"""Largest error allowed, relative to the largest magnitude of the result."""
if INTERPRETED:
    del ERROR[torch.bfloat16]  # the interpreter of OpenAI Triton 3.6 multiplies the bit patterns of bfloat16
DTYPES = pytest.mark.parametrize("dtype", ERROR, ids=str)


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products of the reference, on CUDA, are not to be TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


class Random:
    """Tensors of one dtype from one seed."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=self.generator) * scale).to(DEVICE, self.dtype)


def close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert result.isfinite().all()
    error = (result.float() - expected).abs().max() / expected.abs().max()
    assert error < ERROR[dtype], float(error)


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 576), (17, 2048), (2, 5000)])
def test_norm(dtype: torch.dtype, tokens: int, width: int) -> None:
    random = Random(dtype, width)
    hidden, update, weight = random(tokens, width), random(tokens, width), random(width)
    for given in (weight, weight.float()):
        expected = reference.normed(hidden.float(), None, given.float(), 1e-5)
        close(kernels.normed(hidden, None, given, 1e-5), expected, dtype)
    added = hidden.clone()
    result = kernels.normed(added, update, weight, 1e-5)
    assert torch.equal(added, hidden + update)
    close(result, reference.normed(added.float(), None, weight.float(), 1e-5), dtype)


@DTYPES
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "turning"),
    [(9, 3, 64, 64), (4, 1, 80, 32), (1, 1, 128, 128), (16, 8, 128, 64), (3, 3, 256, 256), (2, 1, 96, 96)],
)
def test_rope(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, turning: int, with_norms: bool) -> None:
    random = Random(dtype, dim)
    tokens, blocks, block_size = 5, 6, 4
    qkv = random(tokens, (heads + 2 * kv_heads) * dim)
    angles = torch.rand(tokens, turning // 2, generator=random.generator).repeat(1, 2) * 6
    cos, sin = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
    norms = (random(dim), random(dim)) if with_norms else None
    exact_norms = (norms[0].float(), norms[1].float()) if norms else None
    kv = random(blocks + 1, block_size, 2, kv_heads, dim)
    exact = kv.float()
    slots = torch.tensor([7, 2, 23, 0, 24], device=DEVICE)
    result = kernels.roped(qkv, cos, sin, kv, slots, heads, norms, 1e-6)
    expected = reference.roped(qkv.float(), cos.float(), sin.float(), exact, slots, heads, exact_norms, 1e-6)
    close(result, expected, dtype)
    close(kv, exact, dtype)
    others = [slot for slot in range((blocks + 1) * block_size) if slot not in slots.tolist()]
    assert torch.equal(kv.flatten(0, 1)[others].float(), exact.flatten(0, 1)[others])
    assert torch.equal(kv.flatten(0, 1)[slots, 1], qkv.view(tokens, -1, dim)[:, heads + kv_heads :])


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 1100)])
def test_gate(dtype: torch.dtype, activation: str, tokens: int, width: int) -> None:
    gate_up = Random(dtype, width)(tokens, 2 * width, scale=3)
    close(kernels.gated(gate_up, activation), reference.gated(gate_up.float(), activation), dtype)


class Product:
    """A linear's inputs, and the check of what it gives."""

    def __init__(self, dtype: torch.dtype, tokens: int, outputs: int, width: int, seed: int = 0) -> None:
        random = Random(dtype, seed)
        self.dtype = dtype
        self.x = random(tokens, width)
        self.weight = random(2 * outputs, width, scale=width**-0.5)
        self.bias = random(2 * outputs)
        self.residual = random(tokens, outputs)
        self.gain = random(width)

    def check(self, parts: str, activation: str | None, chosen: Shape | None = None) -> None:
        """parts: letters of what takes part, bias, residual and norm; chosen: else as the rule says."""
        count = len(self.weight) // (2 if activation is None else 1)
        weight, bias = self.weight[:count], self.bias[:count] if "b" in parts else None
        residual = self.residual.clone() if "r" in parts else None
        norm = (self.gain, 1e-5) if "n" in parts else None
        if chosen is None:
            result = kernels.linear(self.x, weight, bias, residual, norm, activation)
        else:
            result = small_linear.by_shape(chosen, self.x, weight, bias, residual, norm, activation)
        assert residual is None or result is residual
        expected = reference.linear(
            self.x.float(),
            weight.float(),
            None if bias is None else bias.float(),
            None if residual is None else self.residual.float(),
            None if norm is None else (self.gain.float(), 1e-5),
            activation,
        )
        close(result, expected, self.dtype)


PARTS = ["".join(x) for x in itertools.product(("", "b"), ("", "r"), ("", "n"))]
SHAPES = [Shape(16, 128, 4, 1), Shape(32, 64, 4, 3), Shape(16, 64, 2, 2, 3), Shape(64, 128, 4, 2, 2)]


@DTYPES
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("activation", [None, "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_linear_parts(dtype: torch.dtype, parts: str, activation: str | None, tokens: int) -> None:
    """By the rule, then every shape that differs in kind; sizes that no shape divides."""
    made = Product(dtype, tokens, 40, 200, len(parts))
    made.check(parts, activation)
    for chosen in SHAPES if tokens > 1 else SHAPES[:1]:
        made.check(parts, activation, chosen)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 16, 17, 40])
@pytest.mark.parametrize(("outputs", "width"), [(128, 256), (200, 576), (24, 2304)])
def test_linear_sizes(dtype: torch.dtype, tokens: int, outputs: int, width: int) -> None:
    made = Product(dtype, tokens, outputs, width, tokens)
    made.check("rn", None)
    made.check("n", "silu")


@DTYPES
@pytest.mark.parametrize("tokens", [17, 25, 32])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_linear_of_more_tokens_than_one_tile_of_sixteen(
    dtype: torch.dtype, tokens: int, activation: str | None
) -> None:
    made = Product(dtype, tokens, 40, 200, tokens)
    for chosen in SHAPES[1:]:
        made.check("brn", activation, chosen)


@DTYPES
def test_linear_keeps_the_norm_apart_or_inside_as_the_shape_says(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Product(dtype, 4, 64, 512)
    for chosen in (Shape(64, 256, 4, 2), Shape(64, 128, 4, 2), Shape(64, 128, 4, 2, 2)):
        monkeypatch.setattr(small_linear, "shape", lambda *_, chosen=chosen: chosen)
        made.check("n", None)
        made.check("rn", "silu")


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_large_values_times_weights_do_not_leave_float16(activation: str | None) -> None:
    made = Product(torch.float16, 2, 32, 256)
    made.x *= 12000
    made.gain *= 20
    made.weight /= 20
    made.check("n", activation)
    made.check("n", activation, SHAPES[2])


def test_splits_always_add_in_the_same_order() -> None:
    made = Product(torch.float16, 5, 64, 512)
    runs = [small_linear.by_shape(SHAPES[3], made.x, made.weight, None, None, None, None) for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("tokens", [1, 2, 8, 16])
@pytest.mark.parametrize(
    ("outputs", "width", "activation"),
    [(6144, 4096, None), (4096, 4096, None), (14336, 4096, "silu"), (4096, 14336, None), (128256, 2048, None)],
)
def test_linear_of_real_sizes(tokens: int, outputs: int, width: int, activation: str | None) -> None:
    made = Product(torch.bfloat16, tokens, outputs, width)
    made.check("n", activation)
    made.check("r", activation)


@pytest.mark.skipif(INTERPRETED, reason="large")
def test_weights_beyond_int32() -> None:
    rows, width = 300_000, 8192
    weight = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    weight[-1], weight[-2] = 1.0, 2.0
    for tokens in (1, 4):
        x = torch.full((tokens, width), 0.5, dtype=torch.bfloat16, device=DEVICE)
        result = kernels.linear(x, weight, None, None, None, None)
        assert result[:, -3:].tolist() == [[0.0, 8192.0, 4096.0]] * tokens
        for chosen in SHAPES if tokens > 1 else []:
            assert torch.equal(small_linear.by_shape(chosen, x, weight, None, None, None, None), result)


def rows(*values: Sequence[float]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 10), (3, 1024), (9, 5000), (2, 20001)])
def test_best(dtype: torch.dtype, tokens: int, width: int) -> None:
    logits = Random(dtype, width)(tokens, width)
    values, ids = kernels.best(logits)
    assert values.dtype == torch.float32
    assert ids.dtype == torch.int64
    expected_values, expected_ids = reference.best(logits)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(values, logits.float().amax(1))


def test_best_of_equal_infinite_and_broken_values() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.zeros(6, 3000, device=DEVICE)
    logits[0, [700, 2500, 1100]] = 1.0
    logits[1] = -inf
    logits[2, [5, 2900]] = inf
    logits[3, 1500] = nan
    logits[3, 2] = inf
    logits[4, [2999, 2048]] = nan
    logits[5] = nan
    for of in (kernels, reference):
        values, ids = of.best(logits)
        assert ids.tolist() == [700, 0, 5, 1500, 2048, 0]
        torch.testing.assert_close(values, torch.tensor([1.0, -inf, inf, nan, nan, nan], device=DEVICE), equal_nan=True)


def test_rule_covers_every_size() -> None:
    for tokens, outputs, width, gated, size in itertools.product(
        range(1, 17), (8, 2048, 4096, 128256), (64, 576, 4096, 14336), (False, True), (2, 4)
    ):
        chosen = shape(tokens, outputs, width, gated, size)
        assert chosen is None or (chosen.columns >= 64 and (tokens == 1 or chosen.rows >= 16))


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("tokens", [1, 4, 16, 32])
def test_cuda_graph_follows_new_values(tokens: int) -> None:
    """Everything in a row, as a layer would; a replay computes what is in its inputs then."""
    random = Random(torch.bfloat16)
    hidden, qkv_weight, weight = random(tokens, 512), random(768, 512, scale=0.05), random(512, 512, scale=0.05)
    gate, head, gain = random(1024, 512, scale=0.05), random(5000, 512, scale=0.05), random(512)
    cos, sin, kv = random(tokens, 64), random(tokens, 64), random(9, 16, 2, 2, 64)
    slots = torch.arange(tokens, device=DEVICE)

    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        qkv = kernels.linear(x, qkv_weight, None, None, (gain, 1e-5), None)
        q = kernels.roped(qkv, cos, sin, kv, slots, 8, (gain[:64], gain[64:128]), 1e-5).flatten(1)
        kernels.linear(q, weight, None, x, None, None)
        up = kernels.linear(x, gate, None, None, (gain, 1e-5), "silu")
        return kernels.best(kernels.linear(kernels.normed(x, up, gain, 1e-5), head, None, None, None, None))

    static = torch.zeros_like(hidden)
    layer(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, ids = layer(static)
    static.copy_(hidden)
    graph.replay()
    expected_values, expected_ids = layer(hidden.clone())
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)
