"""PTX in OpenAI Triton's interpreter, as far as kernels here use it: words of 32 bits, tensor cores, no control flow.

`played()` lends the interpreter what it lacks. Tensors are [threads], 32 to a warp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np


@contextmanager
def played() -> Iterator[None]:
    from triton.runtime import interpreter

    def create_inline_asm(self: Any, asm: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        assert pack == 1, "several elements a thread are not played"
        outputs = constraints.count("=")
        found = run(asm, outputs, [each.data for each in values])
        kinds = [getattr(each, "element_ty", each) for each in types]
        handles = [
            interpreter.TensorHandle(word.view(np.float32 if str(kind) == "fp32" else np.int32), kind)
            for word, kind in zip(found, kinds, strict=True)
        ]
        return SimpleNamespace(get_result=handles.__getitem__)

    builder = interpreter.InterpreterBuilder
    usual, builder.create_inline_asm = builder.create_inline_asm, create_inline_asm
    try:
        yield
    finally:
        builder.create_inline_asm = usual


def run(asm: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """The outputs' words, of these inputs."""
    shape = np.broadcast_shapes(*(np.shape(each) for each in inputs))
    known = {f"${outputs + at}": _bits(np.broadcast_to(each, shape)) for at, each in enumerate(inputs)}
    for line in asm.replace("\n", " ").strip().strip("{}").split(";"):
        if (line := line.strip()) and not line.startswith(".reg"):
            name, _, rest = line.partition(" ")
            _step(name, rest, known, shape)
    return [known[f"${at}"] for at in range(outputs)]


def _step(name: str, rest: str, known: dict[str, Any], shape: tuple[int, ...]) -> None:
    groups = [group.strip("{} ").split(",") for group in re.findall(r"{[^}]*}|[^,{}]+", rest) if group.strip()]
    target, *sources = [[each.strip() for each in group] for group in groups]
    given = [[known[each] if each in known else _constant(each, shape) for each in group] for group in sources]
    if name.startswith("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"):
        known.update(zip(target, _mma(*given), strict=True))
    else:
        known[target[0]] = _ONE[name](*(group[0] for group in given))


def _constant(text: str, shape: tuple[int, ...]) -> Any:
    value = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
    return np.full(shape, value, np.uint32)


def _bits(data: Any) -> Any:
    return np.ascontiguousarray(data).view(np.uint32)


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


def _permuted(a: Any, b: Any, which: Any) -> Any:
    """prmt: each byte of the result is one of the eight of b and a."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    nibbles = [(which >> np.uint32(4 * at)) & np.uint32(7) for at in range(4)]
    parts = [
        (both >> (8 * each).astype(np.uint64) & np.uint64(255)) << np.uint64(8 * at) for at, each in enumerate(nibbles)
    ]
    return sum(parts).astype(np.uint32)


def _logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """lop3: bit by bit what the table has for the three."""
    found = np.zeros_like(a)
    for row in range(8):
        if int(table.flat[0]) >> row & 1:
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


_ONE = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "shr.u32": lambda a, by: a >> by,
    "lop3.b32": _logic,
    "prmt.b32": _permuted,
    "mul.rn.bf16x2": lambda a, b: _words(*(x * y for x, y in zip(_floats(a), _floats(b), strict=True))),
    "rcp.approx.ftz.f32": lambda a: (1 / a.view(np.float32)).view(np.uint32),
}


def _mma(*given: list[Any]) -> list[Any]:
    """d[16, 8] = a[16, 16] @ b[16, 8] + c; which lane has what: PTX ISA, "Matrix Fragments for mma.m16n8k16"."""
    assert all(word.ndim == 1 for words in given for word in words)
    a, b, c = ([word.reshape(-1, 32) for word in words] for words in given)
    lane, warps = np.arange(32), len(a[0])
    row, pair = lane // 4, lane % 4 * 2
    first, second, third = (np.zeros((warps, *sizes)) for sizes in ((16, 16), (16, 8), (16, 8)))
    for at, word in enumerate(a):
        for half, value in enumerate(_floats(word)):
            first[:, row + at % 2 * 8, pair + half + at // 2 * 8] = value
    for at, word in enumerate(b):
        for half, value in enumerate(_floats(word)):
            second[:, pair + half + at * 8, row] = value
    for at, word in enumerate(c):
        third[:, row + at // 2 * 8, pair + at % 2] = word.view(np.float32)
    found = (first @ second + third).astype(np.float32)
    return [_bits(found[:, row + at // 2 * 8, pair + at % 2]).reshape(-1) for at in range(4)]
