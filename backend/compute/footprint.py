"""Footprint: the bytes that a model's weights take where it serves, to be told beside what `backend.fit` forecast."""

from __future__ import annotations

from torch import Tensor, nn

from backend.compute.quantized.layer import packed_weights


def footprint(model: nn.Module) -> int:
    """Bytes of parameters, buffers and packed weights, each storage once: merged siblings are views of one."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for packed in packed_weights(model).values():
        tensors += packed.tensors
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())
