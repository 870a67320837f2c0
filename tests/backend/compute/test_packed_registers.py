"""Products of warp groups that are served: no instruction writes a register that tensor cores may still read.

Compiled for a Hopper GPU and read, not run: that needs OpenAI Triton (`PYTHONPATH` may lend it), and no GPU.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from backend.compute.dense.packed_shape import TALL, WARPGROUPS, Tile

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from sass import code_of, written_in_flight

INT4, INT8, FP8 = 16, 256, 0
FORMS = {
    2: ((INT4, 32, True), (INT4, 128, False), (INT4, 0, True)),
    1: ((INT8, 64, False), (INT8, 32, True), (FP8, 0, False)),
}
CASES = [
    (size, tile, split, form)
    for tiles, splits in ((WARPGROUPS, (False, True)), (TALL, (False,)))
    for (per, size), tile in tiles.items()
    for split, form in itertools.product(splits, FORMS[per])
]


def compiled(size: int, tile: Tile, split: bool, form: tuple[int, int, bool]) -> Any:
    """As packed.py launches it for a bfloat16 weight; with offsets scales are reciprocals in bfloat16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as built
    from triton.experimental.gluon._runtime import GluonASTSource

    from backend.compute.dense.packed_warpgroup import in_shared_memory, packed_warpgroup_kernel

    levels, group, offsets = form
    words = tile.columns // (4 if levels == INT4 else 2)

    def tiled(kind: str, rows: int, columns: int) -> str:
        layout = in_shared_memory(columns)
        return f"tensordesc<{kind}[{rows}, {columns}],{getattr(layout, 'value', layout)!r}>"

    floats = "*bf16" if offsets else "*fp32"
    types = {
        "result": "*bf16", "inputs": tiled("bf16", size, tile.columns), "codes": tiled("i16", tile.rows, words),
        "scale": floats, "outputs": "i32", "tokens": "i32", "tiles": "i32", "groups": "i32", "splits": "i32",
    }  # fmt: skip
    constants = {
        "GROUP": group, "ROWS": tile.rows, "COLUMNS": tile.columns, "TOKENS": size, "STAGES": tile.stages,
        "LEVELS": levels, "DIVIDES": offsets, "num_warps": 4, "bias": None, "residual": None,
    }  # fmt: skip
    for name, kind, given in (("all_sums", "*fp32", split), ("offset", "*bf16", offsets)):
        if given:
            types[name] = kind
        else:
            constants[name] = None
    names = [parameter.name for parameter in packed_warpgroup_kernel.params]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name].startswith("*")}
    aligned |= {(names.index(name),): [["tt.divisibility", 16]] for name in ("outputs", "groups")}
    source = GluonASTSource(
        packed_warpgroup_kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    return built(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(("size", "tile", "split", "form"), CASES, ids=str)
def test_no_register_is_written_while_it_may_be_read(
    size: int, tile: Tile, split: bool, form: tuple[int, int, bool]
) -> None:
    pytest.importorskip("triton.experimental.gluon")
    code = code_of(compiled(size, tile, split, form))
    waits = [text for _, text in code if "DEPBAR.LE gsb0, 0x1" in text]
    assert len(waits) == (4 if form[0] == INT4 else 2)  # ptxas left products to run beside what follows
    assert written_in_flight(code) == []
    assert not [text for _, text in code if text.split()[0] in ("STL", "LDL")]  # and no register in memory


def test_a_register_that_is_written_is_told() -> None:
    product = (0, "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR8], R24, gsb0")
    wait, write = (32, "WARPGROUP.DEPBAR.LE gsb0, 0x0"), (16, "HFMA2.BF16_V2 R153, R4, R5, R6")
    assert written_in_flight([product, wait, write]) == []
    assert written_in_flight([product, write, wait]) == ["0x10 HFMA2.BF16_V2 R153, R4, R5, R6"]
    later = (48, "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert written_in_flight([product, later, write]) == ["0x10 HFMA2.BF16_V2 R153, R4, R5, R6"]
    around = [(0, "LDSM.16.M88.4 R152, [R8]"), (16, "WARPGROUP.ARRIVE"), (32, product[1]), (48, "@P0 BRA 0x0")]
    assert written_in_flight(around) == ["0x0 LDSM.16.M88.4 R152, [R8]"]
    assert written_in_flight([*around[:3], (40, wait[1]), around[3]]) == []
