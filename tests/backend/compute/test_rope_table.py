"""A table of rotations holds the numbers that transformers' module gives."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from backend.compute import rope_table

SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_same_numbers(family: str, dtype: torch.dtype) -> None:
    config = transformers.AutoConfig.for_model(family, **SMALL)
    model = transformers.AutoModel.from_config(config)
    rotary = model.rotary_emb
    positions, like = torch.tensor([[3, 0, 40, 7]]), torch.zeros(1, 4, 64, dtype=dtype)
    kinds = [(kind,) for kind in set(config.layer_types)] if family == "gemma3_text" else [()]
    want = [rotary(like, positions, *kind) for kind in kinds]
    for longest in (8, 41):  # the second replaces the first
        assert rope_table.install(model, longest, dtype, torch.device("cpu")) == 1
    for _ in range(2):
        for kind, (cos, sin) in zip(kinds, want, strict=True):
            found = rotary(like, positions, *kind)
            assert torch.equal(found[0], cos) and torch.equal(found[1], sin) and found[0].dtype == dtype


def test_models_without_are_left_alone() -> None:
    assert rope_table.install(nn.Sequential(nn.Linear(2, 2)), 8, torch.float32, torch.device("cpu")) == 0
