"""One token's product with packed weights, in programs of every form, and weights made full, in groups of any size.

They need CUDA. TRITON_INTERPRET=1 runs most of them on CPU, where OpenAI Triton is installed.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from backend.compute.quantized.packed import Packed, Scheme, pack

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
from backend.compute.dense import packed, packed_full, packed_shape  # noqa: E402
from backend.compute.dense.shape import Shape  # noqa: E402

SCHEMES = {
    "int4": Scheme("int4", 32), "int4 row": Scheme("int4", 0), "int4 offsets": Scheme("int4", 64, symmetric=False),
    "int8": Scheme("int8", 32), "int8 row offsets": Scheme("int8", 0, symmetric=False), "fp8": Scheme("fp8", 0),
    "fp8 128": Scheme("fp8", 128),
}  # fmt: skip
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
FORMS = [Shape(1, 32, 1, 1), Shape(4, 128, 1, 1), Shape(2, 256, 4, 1), Shape(8, 64, 2, 4), Shape(16, 512, 4, 1)]


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator(DEVICE).manual_seed(sum(sizes)), device=DEVICE)


def made(scheme: Scheme, outputs: int, width: int) -> tuple[Tensor, Packed]:
    """Inputs and a weight of float32. Columns differ in size, so that one that meets another's input is told."""
    sizes = 1 + torch.arange(width, device=DEVICE) % 7
    return random(1, width), pack(random(outputs, width) * sizes * width**-0.5 / 4, scheme)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@EVERY_SCHEME
@pytest.mark.parametrize("shape", FORMS, ids=str)
@pytest.mark.parametrize("width", [128, 640])
def test_programs_of_every_form(scheme: Scheme, shape: Shape, width: int) -> None:
    """Rows and columns that programs divide and do not; some with more words than the row has."""
    x, weight = made(scheme, 10, width)
    gain, bias, residual = random(width), random(10), random(1, 10)
    plain = packed.by_vector(shape, x, weight, bias, residual.clone(), (gain, 1e-5), None)
    normed = x.double() * (x.double().square().mean() + 1e-5).rsqrt() * gain.double()
    assert relative(plain, normed @ weight.full().double().T + bias + residual) < 2e-5
    found = packed.by_vector(shape, x, weight, None, None, None, "silu")
    gate, up = (x.double() @ weight.full().double().T).chunk(2, -1)
    assert relative(found, torch.nn.functional.silu(gate) * up) < 2e-5


@EVERY_SCHEME
def test_each_column_alone_gives_its_weights(scheme: Scheme) -> None:
    """No code takes another's place."""
    _, weight = made(scheme, 3, 256)
    full = weight.full()
    for column in range(0, 256, 1 if not INTERPRETED else 9):
        x = torch.zeros(1, 256, device=DEVICE)
        x[0, column] = 3.0
        found = packed.by_vector(Shape(4, 64, 1, 1), x, weight, None, None, None, None)
        torch.testing.assert_close(found[0], full[:, column] * 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [64, 200, 2880, 3072, 4096, 8192, 14336])
@pytest.mark.parametrize("outputs", [3, 64, 4096, 14336, 128256])
def test_the_rules_shapes(outputs: int, width: int, gated: bool, per: int) -> None:
    """Threads take whole fours of words, no more than one of each row; processors all have programs."""
    shape = packed_shape.vector(outputs, width, gated, per)
    assert shape.columns == max(32, 128 * shape.warps) or shape.columns < 128
    assert -(-outputs // shape.rows) >= min(outputs, 2 * packed_shape.PROCESSORS)
    assert shape.stages == 1 or shape.stages * shape.columns * 4 < width // per


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("group", "width"), [(2, 20), (6, 60), (12, 1140), (80, 1120), (0, 1094)])
def test_made_full_with_groups_of_any_size(kind: str, group: int, width: int) -> None:
    weight = made(Scheme(kind, group), 11, width)[1]
    assert torch.equal(packed_full.unpacked(weight, torch.empty(weight.shape, device=DEVICE)), weight.full())
