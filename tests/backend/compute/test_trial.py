"""Products with packed weights are tried at load for every number of tokens that is computed in another way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.compute.dense import packed_shape
from backend.compute.quantized import trial
from backend.compute.quantized.packed import Packed, Scheme, pack
from backend.compute.quantized.product import product
from backend.errors import LoadError


def weight(rows: int = 200, width: int = 64, kind: str = "int8", dtype: torch.dtype = torch.float32) -> Packed:
    torch.manual_seed(0)
    return pack(torch.randn(rows, width).to(dtype), Scheme(kind, 32 if kind != "fp8" else 0, symmetric=kind != "int4"))


class Layer(nn.Module):
    """Whose weight is packed, alone or merged with siblings'."""

    def __init__(self, own: Packed, group: Any = None) -> None:
        super().__init__()
        self.weight = own
        if group is not None:
            self.group = group


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_what_serves_passes(kind: str, dtype: torch.dtype) -> None:
    trial.tried([weight(kind=kind, dtype=dtype), weight(30, kind=kind, dtype=dtype)])


@pytest.mark.parametrize("tokens", trial.TOKENS)
@pytest.mark.parametrize("row", [0, 199])
def test_a_product_that_is_off_is_named(tokens: int, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, given: Packed, bias: Tensor | None) -> Tensor:
        found = product(x, given, bias)
        if len(x) == tokens:
            found[-1, row] += 0.01 * found.abs().max()
        return found

    monkeypatch.setattr(trial, "product", wrong)
    with pytest.raises(LoadError, match=rf"of {tokens} tokens with int8 weights \[200, 64\] differs .* by 0.0"):
        trial.tried([weight()])


def test_what_is_no_number_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "product", lambda x, given, bias: product(x, given, bias) * float("nan"))
    with pytest.raises(LoadError, match="by inf of"):
        trial.tried([weight()])


def test_each_form_is_tried_once_and_merged_weights_whole() -> None:
    merged, one, other = weight(300), weight(100), weight(100)
    layers = [Layer(one), Layer(other), Layer(merged.rows(0, 100), Layer(merged)), Layer(weight(kind="fp8"))]
    found = [each.shape for each in trial.multiplied(nn.Sequential(*layers, nn.Linear(2, 2)))]
    assert found == [(100, 64), (300, 64), (200, 64)]


def test_every_way_of_cutting_a_product_is_tried() -> None:
    """Of all numbers of tokens that the kernels take."""
    for group, per in ((32, 2), (64, 1), (4096, 1)):
        for outputs in (6144, 4096, 28672):
            for cut in (
                partial(packed_shape.matrix, outputs=outputs, width=4096, group=group, per=per),
                partial(packed_shape.warpgroup, outputs=outputs, width=4096, per=per),
            ):
                assert {cut(tokens) for tokens in trial.TOKENS[1:]} == {cut(tokens) for tokens in range(2, 257)}
    assert trial.TOKENS[0] == 1 and max(trial.TOKENS) <= packed_shape.TILED
