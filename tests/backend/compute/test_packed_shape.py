"""How products with packed weights are cut into programs for warp groups: arithmetic, without a GPU."""

from __future__ import annotations

import pytest

from backend.compute.dense import packed_shape

PRODUCTS = [(64, 256), (576, 1536), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("tokens", [33, 64, 65, 128, 129, 256])
@pytest.mark.parametrize(("outputs", "width"), PRODUCTS)
def test_programs_of_warp_groups(per: int, tokens: int, outputs: int, width: int) -> None:
    cut = packed_shape.warpgroup(tokens, outputs, width, per)
    assert cut is not None
    shape, size = cut
    assert size == (64 if tokens <= 64 else 128) and width % shape.columns == 0
    held = shape.stages * shape.columns * (shape.rows // per + 2 * size)
    assert 2 * (held + 1024) <= packed_shape.ROOM  # two programs to a processor
    tiles = width // shape.columns
    assert shape.splits <= tiles  # each has some columns
    assert shape.rows % (16 * shape.warps) == 0
    assert shape.columns * per // 2 >= 32  # of words of 16 bits: tensor cores multiply 16 of them at a time


def test_few_tokens_and_odd_widths_are_for_others() -> None:
    assert packed_shape.warpgroup(32, 4096, 4096, 2) is None
    assert packed_shape.warpgroup(64, 4096, 4096 + 32, 2) is None
    assert packed_shape.warpgroup(128, 4096, 4096 + 128, 2) is not None
