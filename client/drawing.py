"""The command text-to-image: images into files and, where it can show them, onto the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from client import text_to_image
from client.arguments import words
from client.errors import InvalidInput
from client.terminal import painter

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

TEXT_TO_IMAGE = {
    name: key for name, key in text_to_image.OPTIONS.items() if name not in ("num_inference_steps", "format")
}
"""Options with a flag of the usual form; the output's name tells the format."""


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("prompt", nargs="*", help="default, and for '-': standard input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of several images, all get a number")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--image", type=Path, metavar="FILE", help="inpainting: what is changed")
    parser.add_argument("--mask-image", type=Path, metavar="FILE", help="inpainting: its white part is drawn anew")


def draw(pipe: Any, options: argparse.Namespace, given: dict[str, Any]) -> Iterable[Any]:
    """Ask, write, show; what was written, for printing."""
    paint = None if options.json else painter(sys.stdout)
    _check(options.output, paint)
    more = {"num_inference_steps": options.steps, "image": options.image, "mask_image": options.mask_image}
    images = pipe(words(options.prompt), **given, **{name: value for name, value in more.items() if value is not None})
    for path, image in zip(_paths(options.output, len(images)), images, strict=True):
        if path is not None:
            _save(image, path)
        if paint is not None:
            print(paint(_png(image)), flush=True)
        if path is not None:
            yield {"file": str(path), **_about(image)} if options.json else f"{path}"


def _check(output: Path | None, paint: Callable[[bytes], str] | None) -> None:
    """Before anything is drawn: whether there is a place for it."""
    if output is None and paint is None:
        raise InvalidInput("this terminal shows no images: name a file with --output")
    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"--output must end in {', '.join(SUFFIXES)}, not {output.name!r}")
    if output is not None and not output.absolute().parent.is_dir():
        raise InvalidInput(f"--output: there is no folder {str(output.absolute().parent)!r}")


def _paths(output: Path | None, count: int) -> list[Path | None]:
    if output is None or count == 1:
        return [output] * count
    return [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(count)]


def _save(image: Any, path: Path) -> None:
    try:
        image.save(path)
    except OSError as error:
        raise InvalidInput(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def _png(image: Any) -> bytes:
    content = BytesIO()
    image.save(content, "png")
    return content.getvalue()


def _about(image: Any) -> dict[str, Any]:
    return {name: image.info[name] for name in ("seed", "nsfw_content_detected") if name in image.info}
