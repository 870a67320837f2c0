"""The operations between attention calls and which module computes them on a device; it does not know models.

Tensors are contiguous; T is the number of tokens. Every operation computes in float32 and rounds once, at its end, to
the dtype of its first argument. Weights of norms may be float32 beside 16-bit activations (Gemma's 1 + weight).
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from backend.compute.quantized.packed import Packed
from backend.errors import LoadError

MODULES = {"cpu": "reference", "cuda": "kernels"}
"""Device type -> module of this package."""
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""What gated and linear know, by transformers' names; gelu is the exact one."""
Norm = tuple[Tensor, float]
"""Weight [K] and epsilon of an RMS norm."""


class Ops(Protocol):
    """What reference.py and kernels.py offer as functions."""

    def few(self, weight: Tensor | Packed) -> int:
        """The most tokens for which linear has kernels of its own with it; beyond, it is the library's product."""

    def normed(self, hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """[T, H] and [T, H] -> RMS norm of their sum, times weight [H]; the sum, rounded, is left in hidden."""

    def roped(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv: Tensor,
        slots: Tensor,
        heads: int,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        """[T, (heads + 2 * kv heads) * D] -> rotated queries [T, heads, D]; keys, rotated, and values go to the cache.

        cos, sin [T, R]: the first R of D rotate, halves paired as in transformers' rotate_half, the rest passes. kv
        [blocks, block_size, 2, kv heads, D] is one layer's cache, slots int64 [T] count its tokens. norms: weights [D]
        of RMS norms of each head of the queries and of the keys, before the rotation.
        """

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """[T, 2 * I], gate first -> activation(gate) * up, [T, I]."""

    def linear(
        self,
        x: Tensor,
        weight: Tensor | Packed,
        bias: Tensor | None,
        residual: Tensor | None,
        norm: Norm | None,
        activation: str | None,
    ) -> Tensor:
        """[T, K] by [N, K] -> [T, N]; the norm of x comes first, then bias, activation and residual.

        With an activation the weight's first half gives the gate, its second what is gated: [T, N / 2]. The result is
        added to residual, in place, and residual returned; it must not share memory with x.
        """

    def product(self, x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
        """[T, K] by [N, K] -> [T, N], for any number of tokens: the library's product, or a packed weight's way."""

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[T, V] -> each row's greatest value, float32 [T], and its lowest index, int64 [T].

        A row that holds NaN gives NaN and the first one's index, as torch.max does.
        """


def ops(device_type: str) -> Ops:
    """The module for a device; LoadError where there is none or it cannot be imported."""
    try:
        return cast(Ops, import_module(f"{__package__}.{MODULES[device_type]}"))
    except KeyError:
        raise LoadError(f"no dense kernels for device {device_type!r}; known: {', '.join(MODULES)}") from None
    except ImportError as error:
        raise LoadError(f"the dense kernels for {device_type!r} cannot be imported: {error}") from error


def known(activation: str) -> str:
    """The same name; LoadError for one that gated does not compute."""
    if activation not in ACTIVATIONS:
        raise LoadError(f"activation {activation!r}: the dense kernels compute {', '.join(ACTIVATIONS)}")
    return activation
