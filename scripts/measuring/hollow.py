"""A checkpoint's folder without weights: its file is a hole, so 140 GB take no room; who loads it draws its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from measuring.shapes import Shape, _described, count


def make_hollow(shape: Shape, layers: int, folder: Path) -> Path:
    """config.json and one safetensors file of zeros, `layers` layers deep; the length is all that disk knows of it."""
    config, tensors = _described(replace(shape, layers=layers))
    header, offset = {}, 0
    for name, dims in tensors.items():
        end = offset + 2 * count(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + offset)
    config.save_pretrained(folder)
    return folder
