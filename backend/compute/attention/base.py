"""What an attention kernel is asked and which one serves a device; it does not know how any of them computes.

A new kernel is one file with the two functions of `Kernel` and its line in KERNELS.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from backend.errors import LoadError

if TYPE_CHECKING:
    from backend.compute.attention.step import Step

KERNELS = {"cpu": "reference", "cuda": "kernels"}
"""Device type -> module of this package."""


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """How one layer weighs its context, beyond being causal."""

    scaling: float
    window: int = 0
    """A query at position p sees positions > p - window; 0: all before it."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap) (Gemma 2); 0: off."""
    sinks: Tensor | None = None
    """[heads], logits that take part in the softmax and carry no value (gpt-oss)."""


class Kernel(Protocol):
    """A module that computes attention of every chunk of a step to its whole sequence."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int, step: Step, rule: Rule) -> Tensor:
        """Writes the new keys and values into the step's cache, then reads.

        [heads, tokens, dim] and twice [kv heads, tokens, dim] -> [tokens, heads, dim].
        """

    def read(self, query: Tensor, layer: int, step: Step, rule: Rule, output: Tensor | None = None) -> Tensor:
        """[tokens, heads, dim], whose keys and values are in the cache already -> [tokens, heads, dim], there if given.

        Contiguous where it is given.
        """


def kernel(device_type: str) -> Kernel:
    """The kernel for a device; LoadError where there is none or it cannot be imported."""
    try:
        return cast(Kernel, import_module(f"{__package__}.{KERNELS[device_type]}"))
    except KeyError:
        raise LoadError(f"no attention kernel for device {device_type!r}; known: {', '.join(KERNELS)}") from None
    except ImportError as error:
        raise LoadError(f"the attention kernel for {device_type!r} cannot be imported: {error}") from error
