"""Splits the denoisers of tiny pipelines on CPU ranks of their own and hands back what each rank computed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rank_processes import Ranks

sys.path.insert(0, str(Path(__file__).parent))


def modules():
    """Modules of blocks by name, each with what it is called with: those that the tiny pipelines do not have too."""
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention, AttnProcessor, JointAttnProcessor2_0

    torch.manual_seed(0)
    joint = dict(
        added_kv_proj_dim=24, dim_head=8, heads=4, out_dim=32, bias=True, processor=JointAttnProcessor2_0(),
        qk_norm="rms_norm", eps=1e-6,
    )  # fmt: skip
    found = {
        "self": Attention(32, heads=4, dim_head=8, bias=True),
        "cross": Attention(32, cross_attention_dim=24, heads=4, dim_head=8),
        "eager": Attention(32, heads=4, dim_head=8, processor=AttnProcessor(), upcast_softmax=True),
        "image": Attention(32, heads=4, dim_head=8, norm_num_groups=4, residual_connection=True),
        "joint": Attention(32, context_pre_only=False, **joint),
        "last joint": Attention(32, context_pre_only=True, **joint),
        "gelu": FeedForward(32, activation_fn="gelu-approximate"),
        "geglu": FeedForward(32, activation_fn="geglu"),
        "swiglu": FeedForward(32, activation_fn="swiglu", bias=False),
        "silu": FeedForward(32, activation_fn="linear-silu"),
    }
    generator = torch.Generator().manual_seed(3)
    hidden, text = (torch.randn(3, 7, width, generator=generator) for width in (32, 24))
    with_text = {"cross", "joint", "last joint"}
    return {
        name: (
            module.eval(),
            {"hidden_states": hidden} | ({"encoder_hidden_states": text} if name in with_text else {}),
        )
        for name, module in found.items()
    }


def compute(module, given):
    """What a block uses of its answer: not where the text went last."""
    with torch.inference_mode():
        answer = module(**given)
    if not isinstance(answer, tuple):
        return (answer,)
    return answer[:1] if module.context_pre_only else answer


def split_and_computed(world):
    """By rank, then name: what each rank computes, its share of the weights, and what was said."""
    return Ranks(world, _split_and_computed).results()


def _split_and_computed(rank, world):
    from backend.compute.images.split_blocks import split_blocks

    found = {}
    for name, (module, given) in modules().items():
        before, said = _size(module), []
        whole = torch.nn.ModuleDict({"it": module})
        split_blocks(whole, world, torch.device("cpu"), said.append)
        found[name] = compute(whole["it"], given), _size(whole) / before, said
    return found


def wrongly_split(world):
    """By rank: how an MLP whose gates are cut like any other projection answers, and what was said of it."""
    return Ranks(world, _wrongly_split).results()


def _wrongly_split(rank, world):
    from backend.compute.images import split_blocks as tried

    tried.HALVES = ()
    named = modules()
    whole = torch.nn.ModuleDict({name: named[name][0] for name in ("geglu", "self")})
    said = []
    tried.split_blocks(whole, world, torch.device("cpu"), said.append)
    return compute(whole["geglu"], named["geglu"][1]), said


def _size(module):
    return sum(value.numel() for value in module.parameters())
