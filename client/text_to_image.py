"""TextToImage: prompts in, PIL images out. It does not know how requests travel; PIL is imported when it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from client.errors import InvalidInput, ServerError
from client.pipeline import Answer, AsyncPipeline, Call, Pipeline
from client.tensors import Tensors, strings, text
from client.values import table, tensors
from client.zero_shot_image import pillow, read

if TYPE_CHECKING:
    from PIL.Image import Image

OPTIONS = table(
    ("negative_prompt", "string", "what the image should not show"),
    ("num_inference_steps", "int32", "denoising steps"),
    ("guidance_scale", "fp32", "how closely to follow the prompt; 1 is off"),
    ("height", "int32", "pixels; otherwise the model's own"),
    ("width", "int32", "pixels; otherwise the model's own"),
    ("seed", "uint64", "the same seed gives the same image; the next images of a prompt count on from it"),
    ("num_images_per_prompt", "int32", "images of each prompt"),
    ("format", "string", "how images travel: png (default), jpeg, webp or raw"),
    ("strength", "fp32", "inpainting: how much of the masked part is drawn anew"),
)

FILES = ("image", "mask_image")
"""Options that are images."""

OUTPUTS = ("image", "seed", "height", "width", "nsfw_content_detected")


class Options(TypedDict, total=False):
    """Keyword arguments of one call; the pipeline's own defaults apply to those not given."""

    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int | Sequence[int]
    """One for all prompts, or one for each."""
    num_images_per_prompt: int
    format: str
    strength: float
    image: Any
    """Inpainting, with mask_image, whose white part is drawn anew: a path, a file's bytes, PIL's, or uint8 pixels."""
    mask_image: Any
    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


class TextToImage(Pipeline):
    """Images of prompts, blocking."""

    def __call__(self, prompt: str | Sequence[str], **options: Unpack[Options]) -> list[Image]:
        """PIL images, those of the first prompt first.

        An image's `info` has its `seed`, and `nsfw_content_detected` where a safety checker made it black.
        """
        timeout = options.pop("timeout", None)
        return self.ask(questions(prompt, options), timeout)


class AsyncTextToImage(AsyncPipeline):
    """Images of prompts, for asyncio."""

    async def __call__(self, prompt: str | Sequence[str], **options: Unpack[Options]) -> list[Image]:
        """As `TextToImage.__call__`."""
        timeout = options.pop("timeout", None)
        return await self.ask(questions(prompt, options), timeout)


def questions(prompt: str | Sequence[str], options: Mapping[str, Any]) -> Call[list[Image]]:
    """The task: one request a prompt; the server draws them together where it can. InvalidInput without Pillow."""
    pillow()  # before anything is drawn
    prompts = [prompt] if isinstance(prompt, str) else [*prompt]
    seeds = _seeds(options.get("seed"), len(prompts))
    others = {name: value for name, value in options.items() if name != "seed"}
    asked = [one(each, {**others, "seed": seed}) for each, seed in zip(prompts, seeds, strict=True)]
    format_ = options.get("format") or "png"
    return Call(asked, lambda answers: [image for answer in answers for image in images(answer, format_)])


def one(prompt: str, options: Mapping[str, Any]) -> Tensors:
    """A prompt and its options as tensors of shape [1, 1]."""
    files = {name: strings(read(options[name], name)) for name in FILES if options.get(name) is not None}
    others = {name: value for name, value in options.items() if name not in FILES}
    return {"prompt": strings(text(prompt, "prompt")), **files, **tensors(OPTIONS, others)}


def images(answer: Answer, format_: str) -> list[Image]:
    """What one request's answer holds."""
    if len(answer) != 1 or any(name not in answer[0] for name in OUTPUTS):
        raise ServerError("the server's answer is not one of images; is this model of another task?")
    found = {name: answer[0][name].reshape(-1).tolist() for name in OUTPUTS}
    size = (found["width"][0], found["height"][0])
    rows = zip(found["image"], found["seed"], found["nsfw_content_detected"], strict=True)
    return [_opened(file, format_, size, seed, flagged) for file, seed, flagged in rows if file]


def _opened(data: bytes, format_: str, size: tuple[int, int], seed: int, flagged: bool) -> Image:
    from PIL import Image

    image = Image.frombytes("RGB", size, data) if format_ == "raw" else Image.open(BytesIO(data))
    image.load()
    image.info["seed"] = seed
    if flagged:
        image.info["nsfw_content_detected"] = True
    return image


def _seeds(seed: Any, count: int) -> list[Any]:
    if not isinstance(seed, list | tuple | np.ndarray):
        return [seed] * count
    if len(seed) != count:
        raise InvalidInput(f"there are {len(seed)} seeds for {count} prompts: give one, or one for each")
    return [*seed]
