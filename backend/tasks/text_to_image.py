"""text_to_image: prompts in, encoded images out; with an image and a mask, the masked part is drawn anew.

The CPU half: values, seeds, which images are drawn together, PNG and the like. It does not know how images are drawn.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from backend.config import EngineConfig
from backend.errors import InvalidInput, ServingError
from backend.generation.parameter import INT32, UINT64, Parameter, check
from backend.tasks.pictures import FORMATS, read, write
from backend.tasks.pipeline_folder import PipelineFolder
from backend.tasks.task import Array, Row, decode, filled, text_of


@dataclass(frozen=True)
class Picture:
    """One image to be drawn: a piece."""

    prompt: str
    negative_prompt: str | None
    seed: int
    settings: tuple[tuple[str, Any], ...]
    """Arguments of the pipeline's call; images are drawn together where these are the same."""
    image: Array | None = None  # [height, width, 3] uint8
    mask: Array | None = None  # [height, width] uint8: white is drawn anew

    @property
    def kind(self) -> tuple[Any, ...]:
        """What images of one batch share. To SDXL no negative prompt is something else than an empty one."""
        return self.settings, self.negative_prompt is None, self.image is None


@dataclass(frozen=True)
class Item:
    pictures: list[Picture]
    format: str


@dataclass(frozen=True)
class Images:
    """One row of an answer."""

    files: list[bytes]
    seeds: list[int]
    size: tuple[int, int]
    """Height and width."""
    flagged: list[bool]
    """Whether the pipeline's safety checker made an image black."""


class TextToImage:
    """Images of prompts. An image's seed alone fixes its noise, whatever shares its batch."""

    worker: ClassVar[str] = "backend.compute.images.diffusion:Diffusion"

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        config.refuse("pipelines of images are served in dtype, on the device", "quantization", "offload")
        self.config, self.folder = config, PipelineFolder.open(folder)
        self._parameters = {parameter.name: parameter for parameter in _parameters(config, self.folder)}

    def parse(self, row: Row) -> Item:
        prompt = self._text(row, "prompt")
        negative = self._text(row, "negative_prompt") if "negative_prompt" in row else None
        format_ = decode(row.get("format", b"png"), "format").lower()
        check(format_ in FORMATS, f"format must be one of {', '.join(FORMATS)}, not {format_!r:.80}")
        given = {name: each.read(name, row[name]) for name, each in self._parameters.items() if name in row}
        seed = given.pop("seed", None)
        count = given.pop("num_images_per_prompt", 1)
        self._check(given)
        image, mask = self._image(row, given)
        first = secrets.randbits(32) if seed is None else seed  # 32 bits survive JSON's numbers
        settings = tuple(sorted(given.items()))
        seeds = [(first + index) % (UINT64 + 1) for index in range(count)]
        return Item([Picture(prompt, negative, one, settings, image, mask) for one in seeds], format_)

    def prepare(self, items: Sequence[Item]) -> list[list[Picture] | ServingError]:
        return [item.pictures for item in items]

    def cut(self, pieces: Sequence[Picture]) -> list[list[int]]:
        """Images of the same settings together, as many as have the pixels of the largest single image on each rank."""
        batches: dict[tuple[Any, ...], list[list[int]]] = {}
        for index, piece in enumerate(pieces):
            own = batches.setdefault(piece.kind, [])
            if own and len(own[-1]) < self._together(piece):
                own[-1].append(index)
            else:
                own.append([index])
        return [batch for own in batches.values() for batch in own]

    def batch(self, pieces: Sequence[Picture]) -> dict[str, Any]:
        """Plain values: what the ranks know of images is `diffusion.Diffusion.forward`."""
        first = pieces[0]
        return {
            "prompts": [piece.prompt for piece in pieces],
            "negative_prompts": None if first.negative_prompt is None else [each.negative_prompt for each in pieces],
            "seeds": [piece.seed for piece in pieces],
            "images": None if first.image is None else [piece.image for piece in pieces],
            "masks": None if first.mask is None else [piece.mask for piece in pieces],
            "settings": dict(first.settings),
        }

    def join(self, answers: list[Any]) -> list[Any]:
        """Each rank has the images that it drew, and None for the others'."""
        return [next(found for found in ranks if found is not None) for ranks in zip(*answers, strict=True)]

    def finish(self, item: Item, pieces: Sequence[Picture], answers: Sequence[Any]) -> Images:
        if error := next((answer for answer in answers if isinstance(answer, ServingError)), None):
            raise error
        files = [write(pixels, item.format) for pixels, _ in answers]
        height, width = answers[0][0].shape[:2]
        return Images(files, [each.seed for each in pieces], (height, width), [bool(flag) for _, flag in answers])

    def outputs(self, results: Sequence[Images]) -> dict[str, Array]:
        return {
            "image": filled([result.files for result in results], b"", np.object_),
            "seed": filled([result.seeds for result in results], 0, np.uint64),
            "height": np.array([[result.size[0]] for result in results], np.int32),
            "width": np.array([[result.size[1]] for result in results], np.int32),
            "nsfw_content_detected": filled([result.flagged for result in results], False, np.bool_),
        }

    def _text(self, row: Row, name: str) -> str:
        return text_of(row, name, self.config.max_prompt_bytes)

    def _check(self, given: dict[str, Any]) -> None:
        """Sizes and limits that concern several values; of one side alone the other becomes the model's own.

        Some pipelines would ignore a side that comes alone.
        """
        sides = [name for name in ("height", "width") if name in given]
        multiple, most = self.folder.multiple, self.config.max_pixels
        for name in sides:
            check(given[name] % multiple == 0, f"{name} must be a multiple of {multiple}, not {given[name]}")
        if not sides:
            return
        given |= {name: given.get(name, self.folder.side) for name in ("height", "width")}
        if (pixels := self._pixels(given)) > most:
            raise InvalidInput(f"height x width is {pixels} pixels, the limit is {most} (max_pixels)")

    def _image(self, row: Row, given: dict[str, Any]) -> tuple[Array | None, Array | None]:
        """The image and the mask of an inpainting request."""
        asked = [name for name in ("image", "mask_image") if name in row]
        if not asked:
            check("strength" not in given, "strength is for inpainting: give image and mask_image too")
            check(not self.folder.only_inpaints, "image and mask_image are missing: this model only inpaints")
            return None, None
        check(len(asked) == 2, "image and mask_image are given together or not at all")
        check(self.folder.inpaints, f"image cannot be given: {self.folder.kind} does not inpaint")
        strength, steps = given.get("strength"), given.get("num_inference_steps", 50)
        check(strength is None or int(steps * strength) >= 1, f"strength {strength} leaves none of {steps} steps")
        image = read(row["image"], "image", "RGB", self.config.max_pixels)
        mask = read(row["mask_image"], "mask_image", "L", self.config.max_pixels)
        check(mask.shape == image.shape[:2], "image and mask_image must have the same size")
        return image, mask

    def _together(self, piece: Picture) -> int:
        most = self.config.max_pixels // self._pixels(dict(piece.settings))
        ranks = 1 if self.config.split_denoiser else self.config.tensor_parallel
        return max(1, min(most, self.config.max_images)) * ranks

    def _pixels(self, given: dict[str, Any]) -> int:
        """Of one image; a side that is not given is the model's own."""
        sides: list[int] = [given.get(name, self.folder.side) for name in ("height", "width")]
        return sides[0] * sides[1]


def _parameters(config: EngineConfig, folder: PipelineFolder) -> list[Parameter]:
    most, key = (folder.steps, "") if folder.steps < config.max_steps else (config.max_steps, "max_steps")
    return [
        Parameter("num_inference_steps", "INT32", "denoising steps", 1, most, key=key),
        Parameter("guidance_scale", "FP32", "how closely to follow the prompt; 1 or less: no guidance", 0, 1000),
        Parameter("height", "INT32", "pixels", 1, INT32),
        Parameter("width", "INT32", "pixels", 1, INT32),
        Parameter("strength", "FP32", "how much of the masked part is drawn anew", 0, 1, open=True),
        Parameter("seed", "UINT64", "of the first image, the next ones count on; random if not given", 0, UINT64),
        Parameter("num_images_per_prompt", "INT32", "images", 1, config.max_images, key="max_images"),
    ]
