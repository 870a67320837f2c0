"""A folder's diffusers pipeline: loading it, and which models it is made of. It does not know what they are for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backend.config import EngineConfig
from backend.errors import LoadError


def denoiser_of(pipeline: Any) -> Any:
    """The model that runs once a step."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def text_encoders(pipeline: Any) -> dict[str, nn.Module]:
    """The models that read prompts, by name."""
    found = {name: getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def dtype_of(config: EngineConfig) -> torch.dtype:
    """The configured type; auto is float16 on CUDA and float32 on CPU."""
    auto = "float16" if config.device == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    return dtype


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's pipeline on the host: safetensors alone, nothing fetched, no code of its own. LoadError: why not.

    From here on diffusers logs errors alone in this process.
    """
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
    logging.set_verbosity_error()  # the warning that a prompt is cut quotes it
    return pipeline


def place(pipeline: Any, device: torch.device) -> None:
    """Move it to the device, laid out as convolutions like it there."""
    pipeline.to(device)
    if device.type == "cuda":
        for model in (getattr(pipeline, "unet", None), pipeline.vae):
            if model is not None:
                model.to(memory_format=torch.channels_last)


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
