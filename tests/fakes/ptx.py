"""PTX in OpenAI Triton's interpreter, as far as kernels here use it: words of 32 bits, no control flow.

`played()` lends the interpreter what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np


@contextmanager
def played() -> Iterator[None]:
    from triton.runtime import interpreter

    def create_inline_asm(self: Any, asm: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        kinds = [getattr(each, "element_ty", each) for each in types]
        found = run(asm, constraints.count("="), [_in_words(each.data, pack) for each in values])
        handles = [
            interpreter.TensorHandle(word.view(_STORED[str(kind)]).reshape(values[0].data.shape), kind)
            for word, kind in zip(found, kinds, strict=True)
        ]
        return SimpleNamespace(get_result=handles.__getitem__)

    builder = interpreter.InterpreterBuilder
    usual, builder.create_inline_asm = builder.create_inline_asm, create_inline_asm
    try:
        yield
    finally:
        builder.create_inline_asm = usual


_STORED = {"fp32": np.float32, "bf16": np.uint16}
"""As the interpreter has them."""


def _in_words(data: Any, pack: int) -> Any:
    """So many elements to a register of 32 bits; whatever stands beside what, asm for several treats them alike."""
    assert data.itemsize * pack == 4
    return np.ascontiguousarray(data).reshape(-1).view(np.uint32)


def run(asm: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """The outputs' words, of these inputs."""
    known = {f"${outputs + at}": words for at, words in enumerate(inputs)}
    for line in asm.replace("\n", " ").strip().strip("{}").split(";"):
        if (line := line.strip()) and not line.startswith(".reg"):
            name, _, rest = line.partition(" ")
            _step(name, rest, known, inputs[0].shape)
    return [known[f"${at}"] for at in range(outputs)]


def _step(name: str, rest: str, known: dict[str, Any], shape: tuple[int, ...]) -> None:
    target, *sources = [each.strip() for each in rest.split(",")]
    known[target] = _ONE[name](*(known[each] if each in known else _constant(each, shape) for each in sources))


def _constant(text: str, shape: tuple[int, ...]) -> Any:
    return np.full(shape, int(text, 0), np.uint32)


def _floats(word: Any) -> tuple[Any, Any]:
    """The two of bfloat16 in a word, low half first."""
    return (word << np.uint32(16)).view(np.float32), (word & np.uint32(0xFFFF0000)).view(np.float32)


def _words(low: Any, high: Any) -> Any:
    """Rounded to nearest, ties to even."""
    low, high = (
        (bits + 0x7FFF + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        for bits in (np.ascontiguousarray(each).view(np.uint32) for each in (low, high))
    )
    return low | high << np.uint32(16)


def _logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """lop3: bit by bit what the table has for the three."""
    found = np.zeros_like(a)
    for row in range(8):
        if int(table.flat[0]) >> row & 1:
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


_ONE = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, by: a >> by,
    "shl.b32": lambda a, by: a << by,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _logic,
    "fma.rn.bf16x2": lambda a, b, c: _words(*(x * y + z for x, y, z in zip(*map(_floats, (a, b, c)), strict=True))),
    "rcp.approx.ftz.f32": lambda a: (1 / a.view(np.float32)).view(np.uint32),
}
"""What it knows. Products of two of bfloat16 are exact in float32, and its sum with a third is rounded once more."""
