"""Which linear layers get a checkpoint's own codes, and in which scheme; not how those are read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from backend.compute.quantized.checkpoints.read import scheme_of
from backend.compute.quantized.packed import Scheme
from backend.compute.weights import Reader, Recipe
from backend.errors import LoadError
from backend.model_folder import Checkpoint


def schemes(
    model: nn.Module, wanted: Mapping[str, Recipe], checkpoint: Checkpoint, asked: Scheme | None
) -> Scheme | dict[str, Scheme] | None:
    """By the layer's name, of a checkpoint that is quantized; else what is asked for. `model` is whole.

    LoadError where both are there, and for a tensor that is no linear layer's.
    """
    found: dict[str, Scheme] = {}
    for target, recipe in wanted.items():
        forms = [form for name in recipe.names if (form := checkpoint.tensors[name].form)]
        if not forms:
            continue
        owner = target.removesuffix(".weight")
        if recipe.converter is not None or type(model.get_submodule(owner)) is not nn.Linear:
            raise LoadError(f"{recipe.names[0]} is quantized, and {target} is not a linear layer's weight")
        found[owner] = scheme_of(forms[0])
    if found and asked:
        raise LoadError("quantization: the checkpoint is quantized already; leave it out")
    return found or asked


def idle_bias(name: str, reader: Reader) -> bool:
    """Whether this adds nothing: some libraries give every quantized layer a bias, of zeros if the model has none."""
    layer = reader.checkpoint.tensors.get(name.removesuffix(".bias") + ".weight")
    quantized = name.endswith(".bias") and layer is not None and layer.form is not None
    return quantized and not bool(reader.part(name).any())
