"""Images as files and as arrays. It does not know what is on them."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from backend.errors import InvalidInput
from backend.tasks.task import Array

FORMATS: dict[str, dict[str, int]] = {
    "png": {"compress_level": 1},  # the same pixels in half the time of the default, a tenth larger
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
    "raw": {},
}
"""How images are written; raw is their bytes, RGB, row by row."""

READ = ("PNG", "JPEG", "WEBP")


def write(pixels: Array, format_: str) -> bytes:
    """A file's bytes.  # [height, width, 3] uint8"""
    if format_ == "raw":
        return pixels.tobytes()
    file = BytesIO()
    Image.fromarray(pixels).save(file, format_, **FORMATS[format_])
    return file.getvalue()


def read(data: bytes, name: str, mode: str, most: int) -> Array:
    """A file's pixels, [height, width, 3] for RGB or [height, width] for L; InvalidInput before they are unpacked."""
    try:
        with Image.open(BytesIO(data), formats=READ) as opened:
            width, height = opened.size
            if width * height > most:
                raise InvalidInput(f"{name} has {width} x {height} pixels, the limit is {most} (max_pixels)")
            return np.asarray(ImageOps.exif_transpose(opened).convert(mode))
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        raise InvalidInput(f"{name} is not an image file; known: {', '.join(READ)}") from None
