"""One token's product with integer codes by dot products of bytes, against what the codes mean.

It needs CUDA. TRITON_INTERPRET=1 runs it on CPU, where OpenAI Triton is installed: tests/fakes/ptx.py plays the PTX.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

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
sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from ptx import played  # noqa: E402

from backend.compute.dense import packed  # noqa: E402
from backend.compute.dense.shape import Shape  # noqa: E402

SCHEMES = {
    "int4": Scheme("int4", 32), "int4 row": Scheme("int4", 0), "int4 128": Scheme("int4", 128),
    "int4 offsets": Scheme("int4", 32, symmetric=False), "int4 row offsets": Scheme("int4", 0, symmetric=False),
    "int8": Scheme("int8", 0), "int8 64": Scheme("int8", 64), "int8 offsets": Scheme("int8", 32, symmetric=False),
}  # fmt: skip
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


@pytest.fixture(autouse=True)
def _ptx() -> Iterator[None]:
    with played() if INTERPRETED else nullcontext():
        yield


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator(DEVICE).manual_seed(sum(sizes)), device=DEVICE).half()


def meant(weight: Packed) -> Tensor:
    codes, scale = weight._codes().double(), weight.scale.double()[..., None]
    grouped = codes / scale if weight.divides else codes * scale
    return (grouped if weight.offset is None else grouped + weight.offset.double()[..., None]).flatten(1)


def made(scheme: Scheme, outputs: int, width: int) -> Packed:
    sizes = (1 + torch.arange(width, device=DEVICE) % 7) * width**-0.5 / 4
    return pack((random(outputs, width) * sizes).half(), scheme)


@EVERY_SCHEME
@pytest.mark.parametrize("shape", [Shape(4, 128, 1, 1), Shape(2, 64, 1, 1), Shape(8, 256, 1, 1)], ids=str)
@pytest.mark.parametrize(("outputs", "width"), [(5, 256), (10, 1024), (6, 640)])
def test_every_form(scheme: Scheme, shape: Shape, outputs: int, width: int) -> None:
    x, gain, residual, bias = random(1, width), random(width), random(1, outputs), random(2 * outputs)
    weight = made(scheme, 2 * outputs, width)
    half = weight.rows(0, outputs)
    found = packed.by_vector(shape, x, half, bias[:outputs], residual.clone(), (gain, 1e-5), None, True)
    normed = x.double() * (x.double().square().mean() + 1e-5).rsqrt() * gain.double()
    want = normed @ meant(half).T + bias[:outputs].double() + residual.double()
    assert float((found.double() - want).abs().max() / want.abs().max()) < 1e-3
    gate, up = (x.double() @ meant(weight).T + bias.double()).chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    found = packed.by_vector(shape, x, weight, bias, None, None, "silu", True)
    assert float((found.double() - want).abs().max() / want.abs().max()) < 1e-3


@EVERY_SCHEME
def test_each_column_alone_gives_its_weights(scheme: Scheme) -> None:
    weight = made(scheme, 3, 128)
    for column in range(0, 128, 1 if not INTERPRETED else 5):
        x = torch.zeros(1, 128, device=DEVICE, dtype=torch.float16)
        x[0, column] = -3.0
        found = packed.by_vector(Shape(4, 64, 1, 1), x, weight, None, None, None, None, True)
        torch.testing.assert_close(found[0].double(), meant(weight)[:, column] * -3, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(value: float) -> None:
    x = random(1, 256)
    x[0, 77] = value
    assert (
        not packed.by_vector(Shape(4, 64, 1, 1), x, made(SCHEMES["int4"], 4, 256), None, None, None, None, True)
        .isfinite()
        .any()
    )


def test_of_nothing_comes_nothing() -> None:
    x = torch.zeros(1, 256, device=DEVICE, dtype=torch.float16)
    assert (
        packed.by_vector(Shape(4, 64, 1, 1), x, made(SCHEMES["int4"], 4, 256), None, None, None, None, True).eq(0).all()
    )
