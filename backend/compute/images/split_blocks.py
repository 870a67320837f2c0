"""The repeated blocks of a denoiser split among ranks, which then draw every image together. It knows no pipeline.

Attention is split by heads and each MLP by its inner values, into DeepSpeed's layers (the columns and rows of Shoeybi
et al. 2019, Megatron-LM). Each is tried beside what it was and stays whole where the answers differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from backend.compute.all_reduce import agreed
from backend.compute.images.compiled import distance
from backend.errors import LoadError

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0")
"""Those of diffusers that take the number of heads from their module, and have no weights of their own."""

HALVES = ("GEGLU", "SwiGLU")
"""Activations whose projection makes the values and their gates in one."""

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
"""Differences, relative to the largest value: some times what rounding each rank's part makes."""


class Split:
    """One module of a block: which of its layers are cut how, and why it may have to stay whole."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def reason(self, world: int) -> str:
        """Why so many ranks cannot share it; empty if they can."""
        raise NotImplementedError

    def layers(self) -> dict[str, str]:
        """DeepSpeed's class for each linear layer, by its path in the module."""
        raise NotImplementedError

    def example(self) -> dict[str, int]:
        """The widths of what it takes, by argument."""
        raise NotImplementedError

    def narrow(self, world: int) -> None:
        """Tell the module what a rank has of it."""

    def answer(self, given: dict[str, Tensor]) -> Any:
        """What the block uses of the module's answer."""
        return self.module(**given)


class Attention(Split):
    """diffusers' `Attention`, over its own tokens, over a text's, or over both joined."""

    def reason(self, world: int) -> str:
        module = self.module
        kind = type(module.processor).__name__
        if kind not in PROCESSORS or module.spatial_norm is not None or module.fused_projections:
            return f"no test shows that a split {kind} equals a whole one"
        if module.heads % world:
            return f"{world} ranks cannot share its {module.heads} attention heads"
        if module.to_k is None or module.inner_kv_dim != module.inner_dim:
            return "its queries and keys do not have the same heads"
        norms = (getattr(module, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        sizes = [value.numel() for norm in norms if norm is not None for value in norm.parameters()]
        return "a norm spans all its heads" if any(size > module.inner_dim // module.heads for size in sizes) else ""

    def layers(self) -> dict[str, str]:
        names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        found = {name: "LinearLayer" for name in names if getattr(self.module, name, None) is not None}
        found["to_out.0"] = "LinearAllreduce"
        return found | ({"to_add_out": "LinearAllreduce"} if getattr(self.module, "to_add_out", None) else {})

    def example(self) -> dict[str, int]:
        module = self.module
        other = module.added_kv_proj_dim or (module.cross_attention_dim if module.is_cross_attention else None)
        return {"hidden_states": module.query_dim} | ({"encoder_hidden_states": other} if other else {})

    def narrow(self, world: int) -> None:
        for name in ("heads", "inner_dim", "inner_kv_dim"):
            setattr(self.module, name, getattr(self.module, name) // world)

    def answer(self, given: dict[str, Tensor]) -> Any:
        found = self.module(**given)
        return found[0] if self.module.context_pre_only and isinstance(found, tuple) else found  # the text ends there


class FeedForward(Split):
    """diffusers' `FeedForward`: a projection with its activation, a dropout, and the way back."""

    def reason(self, world: int) -> str:
        if not hasattr(self.module.net[0], "proj"):
            return f"no test shows that a split {type(self.module.net[0]).__name__} equals a whole one"
        width: int = self.module.net[2].in_features
        return f"{world} ranks cannot share its {width} inner values" if width % world else ""

    def layers(self) -> dict[str, str]:
        gated = type(self.module.net[0]).__name__ in HALVES
        return {"net.0.proj": "GateUpPack_LinearLayer" if gated else "LinearLayer", "net.2": "LinearAllreduce"}

    def example(self) -> dict[str, int]:
        return {"hidden_states": self.module.net[0].proj.in_features}


KINDS: dict[str, type[Split]] = {"Attention": Attention, "FeedForward": FeedForward}
"""By diffusers' class."""


@torch.inference_mode()
def split_blocks(denoiser: nn.Module, world: int, device: torch.device, say: Callable[[str], None]) -> None:
    """Leave this rank's part of every attention and MLP that can be split; all ranks call it.

    What is split is on the device then; one module after the other was there whole for a moment. LoadError where
    nothing can be split.
    """
    whole: Counter[str] = Counter()
    paths = [path for path, module in denoiser.named_modules() if type(module).__name__ in KINDS]
    for path in paths:
        module = denoiser.get_submodule(path)
        kind = KINDS[type(module).__name__]
        part = kind(deepcopy(module))
        if reason := part.reason(world) or _differs(part, kind(module), world, device):
            whole[reason] += 1
        else:
            denoiser.set_submodule(path, part.module)
        del module, part  # the next one may need the room
    reasons = "".join(f"; {count} whole on every rank: {reason}" for reason, count in whole.items())
    split = len(paths) - whole.total()
    if not split:
        raise LoadError(f"split_denoiser: nothing of this denoiser can be split among {world} ranks{reasons}")
    say(f"{split} of {len(paths)} attentions and MLPs of the denoiser are split among {world} ranks{reasons}")


def _differs(part: Split, whole: Split, world: int, device: torch.device) -> str:
    """Split the part; why it cannot take the place of the whole."""
    whole.module.to(device)
    given = _values(whole, device)
    for path, kind in part.layers().items():
        part.module.set_submodule(path, _layer(kind, part.module.get_submodule(path), path))
    part.narrow(world)
    part.module.to(device)
    off = distance(part.answer(given), whole.answer(given))
    close = off <= ALLOWED[next(whole.module.parameters()).dtype]
    return "" if agreed(close, device) else "split, it would answer otherwise"


def _layer(kind: str, linear: nn.Module, path: str) -> nn.Module:
    """DeepSpeed's layer with this rank's part. It takes the linear layer's weights away."""
    from deepspeed.module_inject import layers

    made: nn.Module = getattr(layers, kind)(linear, dist.group.WORLD, name=path)
    return made.requires_grad_(False)


def _values(part: Split, device: torch.device) -> dict[str, Tensor]:
    """Random ones, the same on every rank.  # [2, 8, width] each"""
    generator, dtype = torch.Generator().manual_seed(0), next(part.module.parameters()).dtype
    return {
        name: torch.randn(2, 8, width, generator=generator).to(device, dtype) for name, width in part.example().items()
    }
