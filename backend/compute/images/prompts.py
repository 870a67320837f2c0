"""Prompts as a pipeline's text encoders see them, ahead of its call. It knows no requests.

Text encoders that are split among ranks are a meeting of all: every rank reads all prompts here, in one order, and then
draws its own images without the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from backend.compute.images.pipeline import text_encoders
from backend.compute.split_loaded import split, unsplittable

NAMES = {
    2: ("prompt_embeds", "negative_prompt_embeds"),
    4: ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
}
"""What a pipeline's `encode_prompt` answers, by its length."""

MASKED = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
"""The same of PixArt's."""


def split_text_encoders(pipeline: Any, rank: int, world: int, device: torch.device, say: Callable[[str], None]) -> bool:
    """Give each rank its part of what can be split exactly; whether there was any. The rest is whole on every rank."""
    found = False
    for name, model in text_encoders(pipeline).items():
        if reason := unsplittable(model, world):
            say(f"{name} is whole on every rank: {reason}")
            continue
        assert isinstance(model, PreTrainedModel)
        split(model, rank, world, device)
        say(f"{name} is split among {world} ranks")
        found = True
    return found


def embedded(pipeline: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `embeds`: for each image what its prompts became, by the names of the pipeline's call."""
    asked = inspect.signature(pipeline.encode_prompt).parameters
    usual = {name: each.default for name, each in inspect.signature(type(pipeline).__call__).parameters.items()}
    given = {**usual, **batch["settings"], "prompt": batch["prompts"], "device": pipeline._execution_device}
    given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": guided(pipeline, given["guidance_scale"])}
    if batch["negative_prompts"] is not None:
        given["negative_prompt"] = batch["negative_prompts"]
    answer = pipeline.encode_prompt(**{name: value for name, value in given.items() if name in asked})
    names = MASKED if "PixArt" in type(pipeline).__name__ else NAMES[len(answer)]
    named = {name: value for name, value in zip(names, answer, strict=True) if isinstance(value, Tensor)}
    return {**batch, "embeds": [_row(named, index) for index in range(len(batch["prompts"]))]}


def guided(pipeline: Any, scale: float) -> bool:
    """Whether the pipeline will guide its images, and so needs what the prompts are not."""
    unet = getattr(pipeline, "unet", None)
    return scale > 1 and (unet is None or unet.config.time_cond_proj_dim is None)


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor | None]:
    """Arguments of the pipeline's call that stand for prompts: one tensor for all images, by name."""
    found: dict[str, Tensor | None] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {"negative_prompt": None, **found}


def _row(named: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: value[index] for name, value in named.items()}
