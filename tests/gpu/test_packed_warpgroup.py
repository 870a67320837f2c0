"""Several tokens' product with packed weights by warp groups, in programs of every form: they need a Hopper GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backend.compute.quantized.packed import Packed, Scheme, pack

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from codes import exact

from backend.compute.dense import packed, packed_shape
from backend.compute.dense.shape import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
    ),
]
SCHEMES = {
    "int4": Scheme("int4", 32), "int4 row": Scheme("int4", 0), "int4 128": Scheme("int4", 128),
    "int4 offsets": Scheme("int4", 32, symmetric=False), "int4 row offsets": Scheme("int4", 0, symmetric=False),
    "int4 512 offsets": Scheme("int4", 512, symmetric=False),
    "int8": Scheme("int8", 0), "int8 64": Scheme("int8", 64), "int8 offsets": Scheme("int8", 32, symmetric=False),
    "int8 row offsets": Scheme("int8", 0, symmetric=False), "fp8": Scheme("fp8", 0), "fp8 128": Scheme("fp8", 128),
}  # fmt: skip
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
FORMS = [
    (Shape(64, 256, 4, 2, 4), 64), (Shape(64, 128, 4, 3, 2), 128), (Shape(64, 64, 4, 4), 128),
    (Shape(128, 128, 4, 2), 64), (Shape(128, 64, 4, 4, 3), 16), (Shape(256, 128, 8, 2), 32),
]  # fmt: skip
FEWER = 1e-2
"""Of the largest value: bfloat16's rounding of weights, of results and of what they are added to."""


def random(*sizes: int) -> Tensor:
    made = torch.randn(*sizes, generator=torch.Generator("cuda").manual_seed(sum(sizes)), device="cuda")
    return made.bfloat16()


def made(scheme: Scheme, tokens: int, outputs: int, width: int) -> tuple[Tensor, Packed]:
    """Columns differ in size, so that one that meets another's input is told."""
    sizes = (1 + torch.arange(width, device="cuda") % 7) * width**-0.5 / 4
    return random(tokens, width), pack((random(outputs, width) * sizes).bfloat16(), scheme)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected).abs().max() / expected.abs().max())


def test_this_gpu_has_them() -> None:
    assert packed.warpgroups_multiply(torch.device("cuda", torch.cuda.current_device()))


@EVERY_SCHEME
@pytest.mark.parametrize(("shape", "size"), FORMS, ids=str)
def test_programs_of_every_form(scheme: Scheme, shape: Shape, size: int) -> None:
    """Rows and tokens that programs do not divide; a bias, a residual, a norm; twice the same."""
    tokens, outputs, width = size + 9, 328, 1024
    x, weight = made(scheme, tokens, outputs, width)
    gain, bias, residual = random(width), random(outputs), random(tokens, outputs)
    plain = packed.by_matrix(shape, size, x, weight, None, None, warpgroups=True)
    assert relative(plain, x.double() @ exact(weight).T) < FEWER
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
    runs = [
        packed.by_matrix(shape, size, x, weight, bias, residual.clone(), (gain, 1e-5), warpgroups=True)
        for _ in range(2)
    ]
    assert relative(runs[0], normed @ exact(weight).T + bias.double() + residual.double()) < FEWER
    assert torch.equal(*runs)


@EVERY_SCHEME
def test_each_column_alone_gives_its_weights(scheme: Scheme) -> None:
    """No code takes another's place: 64 columns at a time, each of another token."""
    _, weight = made(scheme, 1, 72, 1024)
    for start in range(0, 1024, 64):
        x = torch.zeros(64, 1024, device="cuda", dtype=torch.bfloat16)
        x[:, start : start + 64] = torch.eye(64, device="cuda", dtype=torch.bfloat16)
        found = packed.by_matrix(Shape(64, 128, 4, 3), 64, x, weight, None, None, warpgroups=True)
        torch.testing.assert_close(
            found.t().double(),
            exact(weight)[:, start : start + 64],
            rtol=1e-2,
            atol=1e-2 * float(weight.full().abs().max()),
        )


@EVERY_SCHEME
@pytest.mark.parametrize("tokens", [33, 64, 100, 128, 200, 256])
@pytest.mark.parametrize(("outputs", "width"), [(6144, 4096), (28672, 4096), (4096, 14336), (576, 1536)])
def test_what_serves(scheme: Scheme, tokens: int, outputs: int, width: int) -> None:
    x, weight = made(scheme, tokens, outputs, width)
    if packed.scales(x, weight):
        pytest.skip("rounds activations")
    assert packed_shape.warpgroup(tokens, outputs, width, 8 // scheme.bits)
    assert relative(packed.product(x, weight, None), x.double() @ exact(weight).T) < FEWER
