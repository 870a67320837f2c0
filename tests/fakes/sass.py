"""What a kernel's machine code (SASS) of a Hopper GPU does with registers that tensor cores still read.

A product of warp groups (HGMMA) reads its first factor from registers after the next instructions have begun, until a
wait (WARPGROUP.DEPBAR) says that it is done. ptxas does not always keep others from writing there meanwhile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

Code = list[tuple[int, str]]
"""Addresses and instructions."""
NO_TARGET = {
    "ST", "STG", "STS", "STL", "BAR", "HGMMA", "WARPGROUP", "SYNCS", "BRA", "EXIT", "UTMALDG", "MEMBAR", "ISETP",
    "FSETP", "PLOP3", "DEPBAR", "LDGDEPBAR", "NOP", "FENCE", "ELECT", "R2UR", "ERRBAR", "CCTL", "WARPSYNC", "BSSY",
    "BSYNC", "RET", "CALL",
}  # fmt: skip


def code_of(kernel: Any) -> Code:
    """Of one that OpenAI Triton compiled; by the cuobjdump that comes with it."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = (re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", line) for line in told.splitlines())
    return [(int(match[1], 16), match[2].strip()) for match in found if match]


def written_in_flight(code: Code) -> list[str]:
    """Instructions that write a register while a product may still read it, loops gone through twice."""
    return sorted({each for path in _paths(code) for each in _written(path)})


def _paths(code: Code) -> list[Code]:
    """From the first to the last instruction; and for each loop of products, with a second time through it."""
    places = {address: index for index, (address, _) in enumerate(code)}
    found = [code]
    for index, (address, text) in enumerate(code):
        match = re.search(r"BRA(?:\.U)? .*?0x([0-9a-f]+)", text)
        if match and int(match[1], 16) < address:
            start = places[int(match[1], 16)]
            if any("HGMMA" in each for _, each in code[start:index]):
                found.append(code[: index + 1] + code[start:])
    return found


def _written(path: Code) -> list[str]:
    found, groups, current = [], list[set[int]](), set[int]()
    for address, text in path:
        if "HGMMA" in text:
            first = int(re.findall(r"\bR(\d+)\b", text)[1])  # after the sums' registers
            current |= set(range(first, first + 4))
            if "gsb0" in text:  # the last of those that a wait counts as one
                groups, current = [*groups, current], set()
        elif match := re.search(r"DEPBAR\.LE gsb0, 0x(\d)", text):
            groups = groups[len(groups) - int(match[1]) :] if int(match[1]) else []
        elif _targets(text) & current.union(*groups):
            found.append(f"{address:#x} {text}")
    return found


def _targets(text: str) -> set[int]:
    """Registers that an instruction writes."""
    name = re.sub(r"^@!?U?P\w+ ", "", text).split()[0]
    base = name.split(".")[0]
    match = re.search(rf"{re.escape(name)}\s+(?:U?P\d+,\s*)?(?:PT,\s*)?R(\d+)", text)
    if base in NO_TARGET or not match:
        return set()
    wide = {".64": 2, "WIDE": 2, ".128": 4}
    count = max((size for mark, size in wide.items() if mark in name), default=1)
    if base == "LDSM":
        count = int(name[-1]) if name[-1].isdigit() else 1
    return set(range(int(match[1]), int(match[1]) + count))
