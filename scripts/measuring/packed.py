"""Products with packed weights alone: µs, bytes a second, and what the library's bf16 product takes beside them.

A graph holds a call for each of several weights, which together are far larger than any L2 cache. Codes are random: a
product takes as long whatever they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from backend.compute.dense import kernels, packed
from backend.compute.quantized.packed import FP8, Packed, Scheme
from measuring.attention import captured
from measuring.ceilings import seconds
from measuring.shapes import Shape

LEAST_BYTES = 1 << 30
MOST = 48
"""Weights in a graph."""
Call = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Product:
    """A projection of a layer, as blocks compute it."""

    name: str
    outputs: int
    """Rows of the weight: gates too."""
    width: int
    activation: str | None = None
    adds: bool = False
    """To the residual stream; others begin with a norm where tokens are few."""


def products(shape: Shape) -> list[Product]:
    kv = shape.kv_heads * shape.head_dim
    return [
        Product("qkv", shape.hidden + 2 * kv, shape.hidden),
        Product("attention out", shape.hidden, shape.hidden, adds=True),
        Product("gate and up", 2 * shape.intermediate, shape.hidden, "silu"),
        Product("down", shape.hidden, shape.intermediate, adds=True),
    ]


def random_packed(scheme: Scheme, outputs: int, width: int, device: torch.device) -> Packed:
    """Of no full weight."""
    made = Packed.empty(scheme, outputs, width, torch.bfloat16, device)
    if scheme.kind == "fp8":
        made.codes.copy_(torch.randn(made.codes.shape, device=device).to(FP8))
    else:
        made.codes.random_(0, 256)
    made.scale.uniform_(50, 100) if made.divides else made.scale.uniform_(0.01, 0.02)
    if made.offset is not None:
        made.offset.uniform_(-0.1, 0.0)
    return made


def call_of(product: Product, tokens: int, device: torch.device) -> Call:
    """What a block does with a weight of this projection and so many tokens."""
    x = torch.randn(tokens, product.width, dtype=torch.bfloat16, device=device)
    gain = torch.ones(product.width, dtype=torch.bfloat16, device=device)
    residual = torch.zeros(tokens, product.outputs, dtype=torch.bfloat16, device=device)

    def call(weight: Any) -> Tensor:
        if tokens > kernels.few(weight):
            return kernels.product(x, weight, None)
        if product.adds:
            return kernels.linear(x, weight, None, residual, None, None)
        return kernels.linear(x, weight, None, None, (gain, 1e-5), product.activation)

    return call


def calls(kind: str, product: Product, tokens: int, device: torch.device) -> dict[str, Call]:
    """What a block does; for fp8 the scaled product too, which rounds activations: blocks take it for prompts alone."""
    found = {kind: call_of(product, tokens, device)}
    if kind == "fp8":
        x = torch.randn(tokens, product.width, dtype=torch.bfloat16, device=device)
        found["fp8 scaled"] = lambda weight: packed.scaled(x, weight, None)
    return found


def library_of(product: Product, tokens: int, device: torch.device) -> Call:
    x = torch.randn(tokens, product.width, dtype=torch.bfloat16, device=device)
    return lambda weight: linear(x, weight)


def time_of(call: Call, weights: list[Any]) -> float:
    """Seconds of one call, the mean over the weights of a replayed graph."""
    graph = captured(lambda: [call(weight) for weight in weights])
    return seconds(graph.replay, times=10, warm=2) / len(weights)


def packed_weights(scheme: Scheme, product: Product, device: torch.device) -> list[Packed]:
    first = random_packed(scheme, product.outputs, product.width, device)
    count = min(MOST, max(2, -(-LEAST_BYTES // first.nbytes)))
    return [first, *(random_packed(scheme, product.outputs, product.width, device) for _ in range(count - 1))]


def full_weights(product: Product, device: torch.device) -> list[Tensor]:
    count = min(MOST, max(2, -(-LEAST_BYTES // (2 * product.outputs * product.width))))
    sizes = (product.outputs, product.width)
    return [torch.randn(sizes, dtype=torch.bfloat16, device=device) for _ in range(count)]
