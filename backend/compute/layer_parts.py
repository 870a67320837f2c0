"""Parts: a decoder layer taken apart, where its structure is one that fused kernels know. It computes nothing.

A layer qualifies by its parts and by every name that its code uses; families are not named.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from backend.compute.cache import LayerSpec
from backend.compute.fused import MergedPart
from backend.compute.norms import Norm, recognised

ACTIVATIONS = {type(ACT2FN[name]): name for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu")} | {nn.SiLU: "silu"}
"""Those that `dense` computes."""

LAYOUTS = (
    ("input_layernorm", "", "post_attention_layernorm", ""),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
"""Names of the norms before and after attention, before and after the MLP."""

ATTENTION_CODE = frozenset(
    {
        "ALL_ATTENTION_FUNCTIONS",
        "_attn_implementation",
        "apply_rotary_pos_emb",
        "attention_dropout",
        "attn_logit_softcapping",
        "config",
        "contiguous",
        "eager_attention_forward",
        "get_interface",
        "getattr",
        "head_dim",
        "is_sliding",
        "k_norm",
        "k_proj",
        "layer_idx",
        "o_proj",
        "q_norm",
        "q_proj",
        "reshape",
        "scaling",
        "shape",
        "sliding_window",
        "training",
        "transpose",
        "update",
        "use_rope",
        "v_proj",
        "view",
    }
)
MLP_CODE = frozenset({"act_fn", "gate_proj", "up_proj", "down_proj"})
"""All that the code of a layer's halves may name: another name is a computation that is not known here."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A layer taken apart."""

    norms: tuple[Norm | None, ...]  # before and after attention, before and after the MLP
    query_key_value: MergedPart
    heads: int
    head_norms: tuple[Tensor, Tensor] | None  # of queries and keys, [head dim]
    eps: float  # of the head norms
    attention_out: nn.Module
    gate_up: MergedPart | None  # None: `mlp` is called as it is
    activation: str
    mlp_out: nn.Module | None
    mlp: nn.Module


def parts_of(layer: nn.Module, spec: LayerSpec) -> Parts | str:
    """The layer's parts, or why it cannot be taken apart."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return "it has no self_attn and mlp"
    names = {name for name, _ in layer.named_children()} - {"self_attn", "mlp"}
    layout = next((each for each in LAYOUTS if {name for name in each if name} == names), None)
    if layout is None or (strange := _names(layer) - names - {"self_attn", "mlp"}):
        return f"it has {', '.join(sorted(names if layout is None else strange))}"
    norms = [recognised(getattr(layer, name)) if name else None for name in layout]
    if any(name and norm is None for name, norm in zip(layout, norms, strict=True)):
        return "its norms are not RMS norms"
    query = getattr(attention, "q_proj", None)
    if not isinstance(query, MergedPart) or len(query.group.sizes) != 3:
        return "its projections are not merged"
    if strange := _names(attention) - ATTENTION_CODE:
        return f"its attention uses {', '.join(sorted(strange))}"
    head_norms = [recognised(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    known = [norm for norm in head_norms if norm]
    if len(known) != sum(hasattr(attention, name) for name in ("q_norm", "k_norm")) or any(
        len(norm.weight) != spec.head_dim for norm in known
    ):
        return "its norms of queries and keys are not one for each head"
    gate_up, activation = _gated(mlp)
    halves: Any = attention, mlp
    return Parts(
        norms=tuple(norms),
        query_key_value=query,
        heads=query.group.sizes[0] // spec.head_dim,
        head_norms=(known[0].weight, known[1].weight) if len(known) == 2 else None,
        eps=known[0].eps if known else 0.0,
        attention_out=halves[0].o_proj,
        gate_up=gate_up,
        activation=activation,
        mlp_out=halves[1].down_proj if gate_up else None,
        mlp=mlp,
    )


def _gated(mlp: nn.Module) -> tuple[MergedPart | None, str]:
    """The merged gate and up projection, and the activation's name, if that is all the MLP is made of."""
    gate = getattr(mlp, "gate_proj", None)
    activation = ACTIVATIONS.get(type(getattr(mlp, "act_fn", None)), "")
    if isinstance(gate, MergedPart) and len(gate.group.sizes) == 2 and activation and _names(mlp) <= MLP_CODE:
        return gate, activation
    return None, ""


def _names(module: nn.Module) -> set[str]:
    """All names that the code of its forward uses."""
    return set(inspect.unwrap(type(module).forward).__code__.co_names)
