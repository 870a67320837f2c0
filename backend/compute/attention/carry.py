"""Carries `step` past decoder layers that drop keyword arguments (StableLM, Nemotron); it knows nothing of it.

Elsewhere transformers hands `step` down by itself and nothing of this is installed.
"""

from __future__ import annotations

from typing import Any

import torch


def carry_step(model: torch.nn.Module) -> None:
    """From now on every module with a layer_idx is called with the `step` that `model` was called with."""
    held: dict[str, Any] = {}

    def take(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        held["step"] = kwargs.get("step")

    def give(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {"step": held["step"], **kwargs}

    model.register_forward_pre_hook(take, with_kwargs=True)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.register_forward_pre_hook(give, with_kwargs=True)
