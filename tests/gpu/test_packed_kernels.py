"""Products with packed weights equal those with the numbers that the codes mean: kinds, groups, sizes, optional parts.

They need CUDA. TRITON_INTERPRET=1 runs most of them on CPU, where OpenAI Triton is installed.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backend.compute.dense import reference
from backend.compute.quantized.packed import FP8, Packed, Scheme, pack

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from codes import exact  # noqa: E402

from backend.compute.dense import kernels, packed, packed_full, packed_shape  # noqa: E402
from backend.compute.dense.shape import Shape  # noqa: E402

ERROR = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
"""Largest error allowed, relative to the largest magnitude of the result."""
if INTERPRETED:
    del ERROR[torch.bfloat16]  # the interpreter of OpenAI Triton 3.6 multiplies the bit patterns of bfloat16
DTYPES = pytest.mark.parametrize("dtype", ERROR, ids=str)
SCHEMES = {
    "int4": Scheme("int4", 32), "int4 row": Scheme("int4", 0), "int4 128": Scheme("int4", 128),
    "int4 offsets": Scheme("int4", 64, symmetric=False), "int4 row offsets": Scheme("int4", 0, symmetric=False),
    "int8": Scheme("int8", 0), "int8 64": Scheme("int8", 64), "int8 offsets": Scheme("int8", 32, symmetric=False),
    "int8 row offsets": Scheme("int8", 0, symmetric=False), "fp8": Scheme("fp8", 0), "fp8 128": Scheme("fp8", 128),
}  # fmt: skip
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products of the reference, on CUDA, are not to be TF32; one thread: other work waits beside."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def close(result: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert result.isfinite().all()
    error = (result.double() - expected).abs().max() / expected.abs().max()
    assert error < factor * ERROR[dtype], float(error)


class Product:
    """A linear's inputs, and the check of what it gives."""

    def __init__(self, dtype: torch.dtype, scheme: Scheme, tokens: int, outputs: int, width: int) -> None:
        self.generator = torch.Generator(DEVICE).manual_seed(tokens * 1000 + outputs)
        self.dtype = dtype
        self.x = self.random(tokens, width)
        self.weight = pack(self.random(2 * outputs, width) * width**-0.5 + 0.01, scheme)
        self.bias, self.residual, self.gain = self.random(2 * outputs), self.random(tokens, outputs), self.random(width)

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device=DEVICE).to(self.dtype)

    def check(self, parts: str, activation: str | None) -> None:
        """parts: letters of what takes part, bias, residual and norm."""
        count = self.weight.shape[0] // (2 if activation is None else 1)
        weight, bias = self.weight.rows(0, count), self.bias[:count] if "b" in parts else None
        residual = self.residual.clone() if "r" in parts else None
        norm = (self.gain, 1e-5) if "n" in parts else None
        result = packed.linear(self.x, weight, bias, residual, norm, activation)
        assert residual is None or result is residual
        gates = activation is not None and len(self.x) > 1  # both its factors are rounded before they are multiplied
        close(result, self.expected(weight, bias, parts, activation), self.dtype, 1.5 if gates else 1.0)

    def expected(self, weight: Packed, bias: Tensor | None, parts: str, activation: str | None) -> Tensor:
        x = self.x.double()
        if "n" in parts:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.gain.double()
        made_full = (
            len(x) > packed_shape.TILED
        )  # with DeepSpeed's two roundings, as test_made_full_as_torch_does has it
        found = x @ (weight.full().double() if made_full else exact(weight)).T
        found = found if bias is None else found + bias.double()
        if activation is not None:
            gate, up = found.chunk(2, -1)
            found = reference.GATES[activation](gate) * up
        return found + self.residual.double() if "r" in parts else found


PARTS = ["".join(x) for x in itertools.product(("", "b"), ("", "r"), ("", "n"))]


@DTYPES
@EVERY_SCHEME
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_form(dtype: torch.dtype, scheme: Scheme, tokens: int) -> None:
    made = Product(dtype, scheme, tokens, 5, 256)
    made.check("brn", None)
    made.check("", "silu")


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("activation", [None, "gelu_pytorch_tanh"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_parts(parts: str, activation: str | None, tokens: int) -> None:
    Product(torch.float16, SCHEMES["int4 offsets"], tokens, 3, 192).check(parts, activation)


@EVERY_SCHEME
@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 130])
def test_sizes(scheme: Scheme, tokens: int) -> None:
    """Odd numbers of outputs, widths that no tile divides, every size of a tile of tokens."""
    made = Product(torch.float16, scheme, tokens, 5, 384)
    made.check("r", None)


@EVERY_SCHEME
@pytest.mark.parametrize(("outputs", "width"), [(3, 128), (2, 1152)])
def test_widths_of_one_token(scheme: Scheme, outputs: int, width: int) -> None:
    made = Product(torch.float16, scheme, 1, outputs, width)
    made.check("n", None)
    made.check("", "silu")


@pytest.mark.parametrize("width", [36, 200, 576, 2880])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_whole_rows_of_any_width(kind: str, width: int, tokens: int) -> None:
    Product(torch.float16, Scheme(kind, 0), tokens, 2, width).check("bn", None)


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["int4", "int4 row offsets", "int8 offsets", "fp8"])
def test_splits(name: str, splits: int) -> None:
    """The last shares are partly or wholly beyond the width."""
    made = Product(torch.float16, SCHEMES[name], 3, 20, 320)
    weight = made.weight.rows(0, 20)
    shape = Shape(16, 64, 4, 1, splits)
    runs = [packed.by_matrix(shape, 16, made.x, weight, made.bias[:20], None) for _ in range(2)]
    close(runs[0], made.expected(weight, made.bias[:20], "b", None), torch.float16)
    assert torch.equal(*runs)


@DTYPES
@EVERY_SCHEME
def test_made_full_as_torch_does(dtype: torch.dtype, scheme: Scheme) -> None:
    weight = Product(dtype, scheme, 1, 7, 1152).weight
    place = torch.empty(weight.shape, dtype=dtype, device=DEVICE)
    assert torch.equal(packed_full.unpacked(weight, place), weight.full())


@pytest.mark.parametrize("name", ["int4", "int8 offsets", "fp8 128"])
def test_many_tokens_by_parts_of_the_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SCRATCH", 15 * 256 * 2)
    monkeypatch.setattr(packed, "TILED", 2)
    made = Product(torch.float16, SCHEMES[name], 3, 24, 256)
    made.check("brn", None)
    made.check("b", "silu")


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_groups_that_no_kernel_takes_are_made_full(kind: str) -> None:
    assert not packed_shape.taken(96, 192, 1)
    made = Product(torch.float16, Scheme(kind, 96), 2, 8, 192)
    made.check("brn", None)
    made.check("", "silu")


@DTYPES
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_every_code_in_every_place(kind: str, group: int, dtype: torch.dtype) -> None:
    """Exactly the number that it means; of small numbers too, which fp8 has."""
    weight = Packed.empty(Scheme(kind, group), 4, 128, dtype, torch.device(DEVICE))
    codes = torch.arange(weight.codes.numel(), device=DEVICE).view_as(weight.codes) * 37 % 256  # all, somewhere
    codes = torch.where((codes & 127 == 127) & (kind == "fp8"), 0, codes)  # NaN
    for turn in range(4):
        weight.codes.view(torch.uint8).copy_(codes.to(torch.uint8).roll(turn, dims=1))
        weight.scale.fill_(2.0)
        found = packed.product(torch.eye(128, dtype=dtype, device=DEVICE), weight, None)
        assert torch.equal(found.double(), exact(weight).T)


@DTYPES
def test_large_numbers_do_not_drown_small_ones(dtype: torch.dtype) -> None:
    """A code's mantissa carries a 1 too much, which is taken away from sums: nothing may be lost to it."""
    made = Product(dtype, SCHEMES["int8"], 1, 16, 512)
    made.x += 30
    made.check("", None)
    made = Product(dtype, SCHEMES["int4 offsets"], 4, 16, 512)
    made.x += 30
    made.check("", None)


@DTYPES
def test_rounded_activations(dtype: torch.dtype) -> None:
    x = Product(dtype, SCHEMES["fp8"], 5, 8, 300).x
    x[2] = 0
    x[3] *= 1000
    codes, scale = packed_full.rounded(x)
    assert codes.dtype == FP8
    torch.testing.assert_close(scale, x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448)
    expected = (x.float() / scale).clamp(-448, 448).to(FP8).float()
    if INTERPRETED:  # the interpreter of OpenAI Triton 3.6 halves what is rounded up to a power of two
        expected = torch.where(codes.float() * 2 == expected, codes.float(), expected)
    assert torch.equal(codes.float(), expected)
    assert torch.equal(codes.float().abs().amax(1), torch.tensor([448, 448, 0, 448, 448.0], device=DEVICE))


def test_the_kernels_linear_takes_packed_weights() -> None:
    made = Product(torch.float16, SCHEMES["int8 64"], 3, 8, 128)
    found = kernels.linear(made.x, made.weight, made.bias, None, (made.gain, 1e-5), "silu")
    close(found, made.expected(made.weight, made.bias, "bn", "silu"), torch.float16)
    want = reference.linear(made.x, made.weight, made.bias, None, (made.gain, 1e-5), "silu")
    close(want, made.expected(made.weight, made.bias, "bn", "silu"), torch.float16)
    wide = replace(made.weight, codes=made.weight.codes[:8], scale=made.weight.scale[:8])
    close(kernels.product(made.x, wide, None), made.expected(wide, None, "", None), torch.float16)
    assert torch.equal(kernels.product(made.x, wide.full(), None), made.x @ wide.full().T)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 128, 256])
@pytest.mark.parametrize(("outputs", "width"), [(64, 64), (576, 1536), (6144, 4096), (28672, 4096), (4096, 14336)])
def test_the_rules_shapes_can_be_launched(kind: str, tokens: int, outputs: int, width: int) -> None:
    """Shares cover the width, shared memory suffices, groups and tiles divide each other."""
    per, bits = (2, 4) if kind == "int4" else (1, 8)
    for group in (32, 128, width):
        shape, size = packed_shape.matrix(tokens, outputs, width, group, per)
        share = -(-width // (shape.columns * shape.splits)) * shape.columns
        assert (shape.splits - 1) * share < width and (shape.splits == 1 or share >= 2 * shape.columns)
        assert shape.columns >= 16 * 16 // bits  # tensor cores multiply 16 places at a time
        assert group == width or shape.columns % group == 0 or group % shape.columns == 0
        assert shape.stages * (shape.rows + 2 * size * per) * shape.columns // per < 200 << 10
    alone = packed_shape.vector(outputs, width, gated=False, per=per)
    assert alone.rows & (alone.rows - 1) == 0 and alone.columns & (alone.columns - 1) == 0


@pytest.mark.parametrize("tokens", [2, 16, 64, 128])
def test_smaller_devices_have_fewer_loads_under_way(tokens: int) -> None:
    """An L4 or RTX 4090 has 99 KiB of shared memory for a program."""
    for per, group in ((1, 64), (2, 32)):
        large, size = packed_shape.matrix(tokens, 4096, 4096, group, per)
        small, same = packed_shape.matrix(tokens, 4096, 4096, group, per, room=99 << 10)
        assert same == size and small._replace(stages=large.stages) == large
        assert 2 <= small.stages <= large.stages
        assert (small.stages - 1) * small.columns * (small.rows // per + 2 * size) <= 99 << 10


def test_tiles_of_float32_inputs_are_small() -> None:
    """Else what one thread holds of them does not fit its registers."""
    for group, tokens in itertools.product((32, 4096), (5, 64, 200)):
        small, large = (packed_shape.matrix(tokens, 3072, 4096, group, 2, size) for size in (4, 2))
        assert small[0].columns * small[1] <= 64 * 32
        assert small[0].columns * small[1] < large[0].columns * large[1]


@pytest.mark.skipif(INTERPRETED, reason="large")
@EVERY_SCHEME
@pytest.mark.parametrize("tokens", [1, 16, 128, 300])
@pytest.mark.parametrize(
    ("outputs", "width", "parts", "activation"), [(3072, 4096, "n", "silu"), (2048, 14336, "r", None)]
)
def test_real_sizes(scheme: Scheme, tokens: int, outputs: int, width: int, parts: str, activation: str | None) -> None:
    if scheme.kind == "fp8" and not scheme.group and tokens >= packed_shape.SCALED:
        pytest.skip("rounds activations")
    Product(torch.bfloat16, scheme, tokens, outputs, width).check(parts, activation)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU that multiplies fp8")
@pytest.mark.parametrize(("tokens", "width"), [(65, 4096), (257, 1024), (1000, 1024), (300, 14336)])
def test_many_tokens_by_fp8_activations(tokens: int, width: int) -> None:
    """Near the product of the rounded activations: the GPU's sums, of fewer bits than float32, lose less to it than
    rounding has lost already, however many they add.
    """
    made = Product(torch.bfloat16, Scheme("fp8", 0), tokens, 256, width)
    if not packed.scales(made.x, made.weight):
        pytest.skip("a GPU without fp8 products")
    found = packed.product(made.x, made.weight, made.bias)
    codes, scale = packed_full.rounded(made.x)
    want = (codes.double() * scale.double()) @ exact(made.weight).T + made.bias.double()
    plain = made.x.double() @ exact(made.weight).T + made.bias.double()
    assert (found.double() - want).norm() < (want - plain).norm() < 0.04 * plain.norm()
    assert (found.double() - plain).norm() < 0.04 * plain.norm()
    if width == 1024:
        close(found, want, torch.bfloat16)


@pytest.mark.skipif(INTERPRETED, reason="large")
def test_codes_beyond_int32() -> None:
    rows, width = 300_000, 8192
    weight = Packed.empty(Scheme("int8", 0), rows, width, torch.bfloat16, torch.device(DEVICE))
    weight.codes.fill_(128)
    weight.scale.fill_(1.0)
    weight.codes[-1], weight.codes[-2] = 129, 130
    for tokens in (1, 4, 20):
        x = torch.full((tokens, width), 0.5, dtype=torch.bfloat16, device=DEVICE)
        assert packed.product(x, weight, None)[:, -3:].tolist() == [[0.0, 8192.0, 4096.0]] * tokens


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA graphs")
@pytest.mark.parametrize("name", ["int4", "int4 offsets", "int8 64", "fp8"])
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_a_graph_holds_them(name: str, tokens: int) -> None:
    made = Product(torch.bfloat16, SCHEMES[name], tokens, 512, 1024)
    static = torch.zeros_like(made.x)

    def computed() -> tuple[Tensor, Tensor]:
        norm = (made.gain, 1e-5)
        return kernels.linear(static, made.weight, None, None, norm, "silu"), kernels.product(static, made.weight, None)

    computed()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = computed()
    static.copy_(made.x)
    graph.replay()
    for one, other in zip(found, computed(), strict=True):
        assert torch.equal(one, other)
