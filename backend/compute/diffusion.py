"""Diffusion: a rank's worker for images; it calls a diffusers pipeline as it is. It does not know requests or files.

Several ranks share the images of a batch; images too few for that share the two halves of classifier-free guidance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from backend.checkpoint import resolve
from backend.compute.diffusion_graphs import DenoiserGraphs
from backend.compute.diffusion_guidance import shared_guidance
from backend.compute.tensor_parallel import join
from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError, ServingError
from backend.ranks.rank import Birth

Batch = dict[str, Any]
"""prompts, negative_prompts (or None), seeds, images and masks (or None), settings: what the task's `batch` makes."""

Drawn = tuple[NDArray[np.uint8], bool]
"""An image [height, width, 3], and whether the safety checker made it black."""

BINNED = (32, 64, 128, 256)
"""The sample sizes for which PixArt's pipelines know shapes that the model was trained with."""


class Diffusion:
    """One rank's pipeline. Every rank gets every batch."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        self._rank, self._world = birth.rank, birth.world
        self._progress = progress if birth.rank == 0 else lambda text: None
        self._device = join(birth, progress)
        self._pipeline = load(resolve(birth.config.model, None), dtype_of(birth.config), self._device)
        self._inpainting = inpainting(self._pipeline)
        if self._device.type == "cuda" and birth.config.cuda_graphs:
            DenoiserGraphs(denoiser_of(self._pipeline), self._device)

    def warm_up(self) -> None:
        """Two steps of one image, and of one on each rank."""
        for count in sorted({1, self._world}):
            found = self.forward(example(count, "Inpaint" in type(self._pipeline).__name__))
            if error := next((each for each in found if isinstance(each, ServingError)), None):
                raise LoadError(f"the pipeline cannot draw: {error}")
            self._progress(f"warm-up: {count} images")

    @torch.inference_mode()
    def forward(self, batch: Batch) -> list[Drawn | ServingError | None]:
        """An entry an image; None where another rank has it, the same error for all where the call was refused."""
        count = len(batch["prompts"])
        try:
            if self._world == 1 or self._share_guidance(count):
                return [*self._draw(batch, shared=self._world > 1)]
            own = range(self._rank, count, self._world)
            images = iter(self._draw(part(batch, own)) if own else [])
            return [next(images) if index in own else None for index in range(count)]
        except ValueError as error:  # diffusers refuses arguments so; the pipeline goes on
            return [InvalidInput(" ".join(str(error).split())[:500])] * count
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return [
                ServingError(f"no device memory for {count} images at once; lower max_pixels or max_images")
            ] * count

    def _share_guidance(self, count: int) -> bool:
        """Whether the ranks, too many for an image each, divide the doubled batch of guidance evenly."""
        return count < self._world and 2 * count % self._world == 0

    def _draw(self, batch: Batch, shared: bool = False) -> list[Drawn | ServingError | None]:
        pipeline = self._pipeline if batch["images"] is None else self._inpainting
        rows = 2 * len(batch["prompts"])
        with shared_guidance(denoiser_of(pipeline), rows, self._rank, self._world) if shared else nullcontext():
            output = pipeline(**arguments(pipeline, batch))
        flags = getattr(output, "nsfw_content_detected", None) or [False] * len(batch["prompts"])
        return [drawn(image, flag) for image, flag in zip(output.images, flags, strict=True)]


def denoiser_of(pipeline: Any) -> Any:
    """The model that runs once a step."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def dtype_of(config: EngineConfig) -> torch.dtype:
    """The configured type; auto is float16 on CUDA and float32 on CPU."""
    auto = "float16" if config.device == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    return dtype


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's pipeline: safetensors alone, nothing fetched, none of its own code. LoadError says why not."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as loading

    logging.disable_progress_bar()
    loading.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, variant=variant_of(folder), dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:500]}") from None
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if device.type == "cuda":
        for model in (getattr(pipeline, "unet", None), pipeline.vae):
            if model is not None:
                model.to(memory_format=torch.channels_last)
    return pipeline


def variant_of(folder: Path) -> str | None:
    """fp16 where a folder holds that alone."""
    weights = [file.name for name in ("unet", "transformer") for file in (folder / name).glob("*.safetensors")]
    return "fp16" if weights and all(".fp16" in name for name in weights) else None


def inpainting(pipeline: Any) -> Any:
    """The pipeline that fills masks with the same weights; None where diffusers has none."""
    import diffusers

    name = type(pipeline).__name__
    if "Inpaint" in name:
        return pipeline
    kind = getattr(diffusers, name.replace("Pipeline", "InpaintPipeline"), None)
    if kind is None:
        return None
    own = {**pipeline.config, **pipeline.components}  # from_pipe would cast what the model keeps in float32
    found = kind(**{name: own[name] for name in inspect.signature(kind.__init__).parameters if name in own})
    found.set_progress_bar_config(disable=True)
    return found


def arguments(pipeline: Any, batch: Batch) -> dict[str, Any]:
    """Of the pipeline's call; what the request did not give stays the pipeline's own default."""
    given = {
        "prompt": batch["prompts"],
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in batch["seeds"]],
        "output_type": "np",
        **batch["settings"],
    }
    if batch["negative_prompts"] is not None:
        given["negative_prompt"] = batch["negative_prompts"]
    if batch["images"] is not None:
        given["image"] = [Image.fromarray(image) for image in batch["images"]]
        given["mask_image"] = [Image.fromarray(mask) for mask in batch["masks"]]
    if "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
        given["use_resolution_binning"] = pipeline.transformer.config.sample_size in BINNED
    return given


def part(batch: Batch, own: range) -> Batch:
    """The batch of these images alone."""
    return {
        name: [values[index] for index in own] if isinstance(values, list) else values for name, values in batch.items()
    }


def drawn(image: NDArray[np.float32], flagged: bool) -> Drawn | ServingError:
    """As bytes, rounded as diffusers does.  # [height, width, 3], 0 to 1"""
    if not np.isfinite(image).all():
        return ServingError("the model made an image that is not a number; load it with dtype bfloat16 or float32")
    return (image * 255).round().astype(np.uint8), bool(flagged)


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
