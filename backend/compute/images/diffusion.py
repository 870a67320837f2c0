"""Diffusion: a rank's worker for images; it calls a diffusers pipeline as it is. It does not know requests or files.

Several ranks share the images of a batch; images too few for that share the two halves of classifier-free guidance. Or,
by `split_denoiser`, each has its part of the denoiser's blocks, and all draw every image together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from backend.compute.images.compiled import Compiled, compiled, dismiss_compilers
from backend.compute.images.graphs import ForwardGraphs, keep_steps_on_host
from backend.compute.images.guidance import shared_guidance
from backend.compute.images.pipeline import denoiser_of, dtype_of, inpainting, load, place, text_encoders
from backend.compute.images.prompts import embedded, split_text_encoders, stacked
from backend.compute.images.split_blocks import split_blocks
from backend.compute.images.witness import Witness, watching
from backend.compute.tensor_parallel import join
from backend.compute.upload import download
from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError, ServingError, one_line
from backend.model_folder import resolve
from backend.ranks.rank import Birth
from backend.tasks.text import Ready

Batch = dict[str, Any]
"""prompts, negative_prompts (or None), seeds, images and masks (or None), settings: what the task's `batch` makes."""

Drawn = tuple[NDArray[np.uint8], bool]
"""An image [height, width, 3], and whether the safety checker made it black."""

Answer = list[Drawn | ServingError | None]

BINNED = (32, 64, 128, 256)
"""The sample sizes for which PixArt's pipelines know shapes that the model was trained with."""


class Diffusion:
    """One rank's pipeline. Every rank gets every batch."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        self._rank, self._world = birth.rank, birth.world
        self._progress = progress if birth.rank == 0 else lambda text: None
        self._device = join(birth, progress)
        self._pipeline = load(resolve(birth.config.model, None), dtype_of(birth.config))
        self._split = self._world > 1 and split_text_encoders(
            self._pipeline, self._rank, self._world, self._device, self._progress
        )
        self._in_parts = birth.config.split_denoiser  # which there are several ranks for
        if self._in_parts:
            split_blocks(denoiser_of(self._pipeline), self._world, self._device, self._progress)
        elif self._world > 1:
            self._progress("the denoiser is whole on every rank: they share images, and the guidance of a single one")
        place(self._pipeline, self._device)
        self._inpainting = inpainting(self._pipeline)
        self._compiled: list[Compiled] = []
        self._witnesses: list[Witness] = []
        if self._device.type == "cuda" and (birth.config.compile or birth.config.cuda_graphs):
            self._witnesses = self._seen_plain()
            self._compiled = self._quicken(birth.config)

    @property
    def _apart(self) -> int:
        """Ranks that draw images of their own."""
        return 1 if self._in_parts else self._world

    def _seen_plain(self) -> list[Witness]:
        """What the models that are about to be replaced answer as they are."""
        models = {"denoiser": denoiser_of(self._pipeline), "decoder": self._pipeline.vae.decoder}
        if not self._split:
            models |= text_encoders(self._pipeline)
        found = [Witness(model, name) for name, model in models.items()]
        with watching(found):
            self._try(self._apart)
        return found

    def _quicken(self, config: EngineConfig) -> list[Compiled]:
        """What takes time on a GPU: launches, and elementwise kernels that a compiler fuses."""
        found = compiled(self._pipeline, self._progress, not self._in_parts) if config.compile else []
        if config.cuda_graphs:
            pool = torch.cuda.graph_pool_handle()
            readers = [] if self._split else text_encoders(self._pipeline).values()
            for model in (*readers, denoiser_of(self._pipeline)):
                ForwardGraphs(model, self._device, pool, self._progress)
            keep_steps_on_host(self._pipeline.scheduler)
        return found

    def warm_up(self) -> Ready:
        """Two steps of one image, of one on each rank, and of two where models are compiled for one and for more.

        Then the output proof of what was put in the models' place.
        """
        for count in sorted({1, self._apart, *([2 * self._apart] if self._compiled else [])}):
            self._try(count)
            self._progress(f"warm-up: {count} images")
        for each in self._compiled:
            each.settle()
        if self._compiled:
            dismiss_compilers()
        return Ready(self._prove())

    def _try(self, count: int) -> None:
        answer = self.forward(example(count, "Inpaint" in type(self._pipeline).__name__))
        found = answer() if callable(answer) else answer
        if error := next((each for each in found if isinstance(each, ServingError)), None):
            raise LoadError(f"the pipeline cannot draw: {error}")

    @torch.inference_mode()
    def _prove(self) -> float:
        """How far the models' answers are from the plain ones, of one step; LoadError where too far."""
        found = 0.0
        for witness in self._witnesses:
            forward = witness.model.forward
            graphs = forward if isinstance(forward, ForwardGraphs) else None
            ways = {"compile": graphs.without if graphs else witness.model}
            found = max(found, witness.confirm(ways | ({"cuda_graphs": witness.model} if graphs else {})))
        if self._witnesses:
            self._progress(f"output proof: within {found:.2g} of the largest value of the plain models'")
        self._witnesses = []
        return found

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Answer | Callable[[], Answer]:
        """An entry an image; None where another rank has it, the same error for all where the call was refused."""
        count = len(batch["prompts"])
        together, meets = self._apart == 1 or self._share_guidance(count), self._split
        try:
            if self._split:
                batch = embedded(self._pipeline if batch["images"] is None else self._inpainting, batch)
            meets = together and self._world > 1
            if together:
                return self._draw(batch, range(count), count, shared=self._apart > 1)
            own = range(self._rank, count, self._world)
            return self._draw(part(batch, own), own, count) if own else [None] * count
        except ValueError as error:  # diffusers refuses arguments so; the pipeline goes on
            return [InvalidInput(one_line(error, 500))] * count
        except torch.OutOfMemoryError:
            if meets:  # the others may wait for this rank's part, and would take the next batch's for it
                raise
            torch.cuda.empty_cache()
            return [
                ServingError(f"no device memory for {count} images at once; lower max_pixels or max_images")
            ] * count

    def _share_guidance(self, count: int) -> bool:
        """Whether there is a rank for each row of guidance's doubled batch."""
        return 2 * count <= self._world

    def _draw(self, batch: Batch, own: range, count: int, shared: bool = False) -> Answer | Callable[[], Answer]:
        """Draw the images `own` of `count`; on CUDA the answer is one to wait for, while the next batch may begin."""
        pipeline = self._pipeline if batch["images"] is None else self._inpainting
        rows = 2 * len(batch["prompts"])
        with shared_guidance(denoiser_of(pipeline), rows, self._rank, self._world) if shared else nullcontext():
            output = pipeline(**arguments(pipeline, batch))
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(batch["prompts"])
        pixels, sound = quantized(output.images)
        if self._device.type != "cuda":
            return spread(drawn(pixels, sound, flags), own, count)
        arrived = download(pixels, sound)

        def answer() -> Answer:
            pixels, sound = arrived()
            return spread(drawn(pixels, sound, flags), own, count)

        return answer


def arguments(pipeline: Any, batch: Batch) -> dict[str, Any]:
    """Of the pipeline's call; what the request did not give stays the pipeline's own default."""
    given = {
        **(stacked(batch["embeds"]) if "embeds" in batch else prompts(batch)),
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in batch["seeds"]],
        "output_type": "pt",
        **batch["settings"],
    }
    if batch["images"] is not None:
        given["image"] = [Image.fromarray(image) for image in batch["images"]]
        given["mask_image"] = [Image.fromarray(mask) for mask in batch["masks"]]
    if "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
        given["use_resolution_binning"] = pipeline.transformer.config.sample_size in BINNED
    return given


def prompts(batch: Batch) -> dict[str, Any]:
    """What the pipeline's text encoders are to read."""
    negative = batch["negative_prompts"]
    return {"prompt": batch["prompts"]} | ({} if negative is None else {"negative_prompt": negative})


def part(batch: Batch, own: range) -> Batch:
    """The batch of these images alone."""
    return {
        name: [values[index] for index in own] if isinstance(values, list) else values for name, values in batch.items()
    }


def quantized(images: Tensor) -> tuple[Tensor, Tensor]:
    """As bytes, rounded as diffusers does, and which are numbers.  # [n, 3, h, w], 0 to 1 -> [n, h, w, 3], [n]"""
    sound = images.isfinite().flatten(1).all(1)
    return (images.float().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).contiguous(), sound


def drawn(pixels: Tensor, sound: Tensor, flags: list[bool]) -> list[Drawn | ServingError]:
    """An entry an image."""
    wrong = ServingError("the model made an image that is not a number; load it with dtype bfloat16 or float32")
    rows = zip(pixels.numpy(), sound.tolist(), flags, strict=True)
    return [(image, bool(flag)) if fine else wrong for image, fine, flag in rows]


def spread(found: list[Drawn | ServingError], own: range, count: int) -> Answer:
    """A rank's own images in their places among all."""
    images = iter(found)
    return [next(images) if index in own else None for index in range(count)]


def example(count: int, with_images: bool) -> Batch:
    """Images of nothing, of the pipeline's own size."""
    blank = np.zeros((64, 64, 3), np.uint8)
    return {
        "prompts": [""] * count,
        "negative_prompts": None,
        "seeds": [0] * count,
        "images": [blank] * count if with_images else None,
        "masks": [blank[..., 0] + 255] * count if with_images else None,
        "settings": {"num_inference_steps": 2},
    }
