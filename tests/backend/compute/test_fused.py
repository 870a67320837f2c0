"""Merged projections: the same numbers from one weight, and an error where the model calls them otherwise."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from backend.compute import fused


class Block(nn.Module):
    def __init__(self, bias: bool = False, **widths: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, width in widths.items():
            setattr(self, name, nn.Linear(12, width, bias=bias))


WIDTHS = OrderedDict(q_proj=24, k_proj=8, v_proj=8)


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_numbers_from_one_weight(bias: bool) -> None:
    block, inputs = Block(bias, **WIDTHS), torch.randn(2, 5, 12)
    want = [getattr(block, name)(inputs) for name in WIDTHS]
    names = list(block.state_dict())
    assert fused.merge(block) == 1
    assert list(block.state_dict()) == names
    for _ in range(2):
        for name, output in zip(WIDTHS, want, strict=True):
            torch.testing.assert_close(getattr(block, name)(inputs), output)
    assert len({value.untyped_storage().data_ptr() for value in (getattr(block, n).weight for n in WIDTHS)}) == 1


def test_filling_a_sibling_fills_the_merged_weight() -> None:
    block, inputs = Block(**WIDTHS), torch.randn(3, 12)
    fused.merge(block)
    block.state_dict()["k_proj.weight"].copy_(torch.ones(8, 12))
    block.q_proj(inputs)
    torch.testing.assert_close(block.k_proj(inputs), inputs.sum(-1, keepdim=True).expand(3, 8))


def test_another_order_or_input_is_an_error() -> None:
    block, inputs = Block(**WIDTHS), torch.randn(3, 12)
    fused.merge(block)
    with pytest.raises(RuntimeError, match="out of order"):
        block.k_proj(inputs)
    block.q_proj(inputs)
    with pytest.raises(RuntimeError, match="another input"):
        block.k_proj(inputs.clone())
    block.k_proj(inputs)
    with pytest.raises(RuntimeError, match="twice"):
        block.k_proj(inputs)
    block.v_proj(inputs)
    with pytest.raises(RuntimeError):
        block.v_proj(inputs)


def test_a_step_that_failed_half_way_does_not_spoil_the_next() -> None:
    block, inputs = Block(**WIDTHS), torch.randn(3, 12)
    want = block.v_proj(inputs)
    fused.merge(block)
    block.q_proj(torch.randn(3, 12))
    for name in ("q_proj", "k_proj"):
        getattr(block, name)(inputs)
    torch.testing.assert_close(block.v_proj(inputs), want)


def test_what_is_not_alike_stays() -> None:
    assert fused.merge(Block(q_proj=8, k_proj=8)) == 0
    mixed = Block(**WIDTHS)
    mixed.k_proj = nn.Linear(12, 8, bias=True)
    assert fused.merge(mixed) == 0
    mixed.k_proj = nn.Linear(16, 8, bias=False)
    assert fused.merge(mixed) == 0
    mixed.k_proj = nn.Sequential(nn.Linear(12, 8, bias=False))
    assert fused.merge(mixed) == 0


def test_gate_and_up_are_merged_too() -> None:
    block, inputs = Block(gate_proj=20, up_proj=20, down_proj=12), torch.randn(3, 12)
    want = block.gate_proj(inputs), block.up_proj(inputs)
    assert fused.merge(block) == 1
    torch.testing.assert_close((block.gate_proj(inputs), block.up_proj(inputs)), want)
    assert type(block.down_proj) is nn.Linear


def test_where_it_pays() -> None:
    assert fused.pays(torch.device("cuda"), torch.float32)
    assert fused.pays(torch.device("cpu"), torch.bfloat16)
    assert not fused.pays(torch.device("cpu"), torch.float32)
