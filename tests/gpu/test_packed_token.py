"""One token's product with int4 weights on tensor cores, against the weights that the codes mean.

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

from backend.compute.dense import reference
from backend.compute.quantized.packed import Packed, Scheme, pack

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    [] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
)
sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from ptx import played  # noqa: E402

from backend.compute.dense import packed, packed_shape  # noqa: E402

SCHEMES = {
    "32": Scheme("int4", 32), "32 offsets": Scheme("int4", 32, symmetric=False), "64": Scheme("int4", 64),
    "128 offsets": Scheme("int4", 128, symmetric=False), "row": Scheme("int4", 0),
    "stored": Scheme("int4", 32, symmetric=False, stored=True),
}  # fmt: skip
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
ERROR = 9e-3 if INTERPRETED else 6e-3
"""bfloat16's, of a result and of a norm's, relative to the largest value; the interpreter cuts instead of rounding."""


@pytest.fixture(autouse=True)
def _ptx() -> Iterator[None]:
    with played() if INTERPRETED else nullcontext():
        yield


def random(*sizes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(sizes))
    return torch.randn(*sizes, generator=generator, device=DEVICE).bfloat16()


def made(scheme: Scheme, outputs: int, width: int) -> tuple[Tensor, Packed]:
    """Inputs and a weight. Columns differ in size, so that one that meets another's input is told."""
    sizes = 1 + torch.arange(width, device=DEVICE) % 7
    return random(1, width, seed=1), pack((random(outputs, width) * sizes * width**-0.5 / 4).bfloat16(), scheme)


def exact(weight: Packed) -> Tensor:
    """What the codes mean, rounded nowhere."""
    codes, scale = weight._codes().double(), weight.scale.double()[..., None]
    grouped = codes / scale if weight.divides else codes * scale
    return (grouped if weight.offset is None else grouped + weight.offset.double()[..., None]).flatten(1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@EVERY_SCHEME
@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize(("outputs", "width"), [(16, 256), (21, 768), (40, 1024)])
def test_every_form(scheme: Scheme, outputs: int, width: int, warps: int) -> None:
    """Rows that programs divide and do not, tiles that warps share evenly and do not."""
    x, weight = made(scheme, 2 * outputs, width)
    gain, bias, residual = random(width, seed=2), random(2 * outputs, seed=3), random(1, outputs, seed=4)
    half = weight.rows(0, outputs)
    found = packed.by_token(warps, x, half, bias[:outputs], residual.clone(), None, None)
    plain = x.double() @ exact(half).T + bias[:outputs].double() + residual.double()
    assert relative(found, plain) < ERROR
    normed = x.double() * (x.double().square().mean() + 1e-5).rsqrt() * gain.double()
    found = packed.by_token(warps, x, half, None, None, (gain, 1e-5), None)
    assert relative(found, normed @ exact(half).T) < ERROR
    found = packed.by_token(warps, x, weight, bias, residual.clone(), (gain, 1e-5), "silu")
    gate, up = (normed @ exact(weight).T + bias.double()).chunk(2, -1)
    assert relative(found, reference.GATES["silu"](gate) * up + residual.double()) < 2 * ERROR


def test_each_column_alone_gives_its_weights() -> None:
    """No code takes another's place, and none another's scale."""
    _, weight = made(Scheme("int4", 32), 19, 512)
    full = exact(weight)
    for column in range(0, 512, 7 if INTERPRETED else 1):
        x = torch.zeros(1, 512, dtype=torch.bfloat16, device=DEVICE)
        x[0, column] = 3.0
        found = packed.by_token(2, x, weight, None, None, None, None)
        torch.testing.assert_close(found[0].double(), full[:, column] * 3, rtol=ERROR, atol=1e-6)


def test_what_is_for_it() -> None:
    x, weight = made(Scheme("int4", 32), 16, 512)
    large = not INTERPRETED and torch.cuda.get_device_capability() >= (8, 0)
    assert packed.unpacks_in_pairs(x, weight) == large
    assert not packed.unpacks_in_pairs(x.half(), weight)
    for scheme, width in ((Scheme("int8", 32), 512), (Scheme("int4", 32), 320), (Scheme("int4", 16), 512)):
        assert not packed.unpacks_in_pairs(random(1, width), made(scheme, 16, width)[1])


@pytest.mark.parametrize("width", [256, 512, 2048, 4096, 14336])
@pytest.mark.parametrize("outputs", [16, 4096, 14336, 128256])
def test_the_rules_shapes(outputs: int, width: int) -> None:
    """A power of two, and a tile for each warp."""
    warps = packed_shape.token(outputs, width)
    assert warps in (1, 2, 4, 8) and warps <= width // 256


@pytest.mark.skipif(INTERPRETED, reason="needs CUDA graphs")
def test_a_graph_holds_it() -> None:
    x, weight = made(Scheme("int4", 32, symmetric=False), 4096, 4096)
    static = torch.zeros_like(x)
    packed.product(static, weight, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = packed.product(static, weight, None)
    static.copy_(x)
    graph.replay()
    assert torch.equal(found, packed.product(x, weight, None))
