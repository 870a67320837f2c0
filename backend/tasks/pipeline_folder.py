"""PipelineFolder: what a diffusers folder says of the images it makes, from its JSON alone; and which ones are served.

It knows neither torch nor diffusers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from backend.errors import LoadError
from backend.json_file import required, values_of
from backend.model_folder import PICKLED

PIPELINES = {
    "StableDiffusionPipeline": "unet",  # 1.x and 2.x
    "StableDiffusionInpaintPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
    "StableDiffusionXLInpaintPipeline": "unet",
    "StableDiffusion3Pipeline": "transformer",
    "StableDiffusion3InpaintPipeline": "transformer",
    "PixArtAlphaPipeline": "transformer",
    "PixArtSigmaPipeline": "transformer",
}
"""diffusers' class -> the part that denoises. Others are refused: their calls take other arguments."""

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""Where parts may come from; the last is diffusers' own name for its safety checker."""

KIND = "diffusers pipeline"

STRIDE = 8
"""The pipelines check that sizes are multiples of this, whatever their VAE."""


@dataclass(frozen=True)
class PipelineFolder:
    """One served pipeline."""

    kind: str
    """diffusers' class."""
    multiple: int
    """Of which height and width are multiples."""
    side: int
    """Height and width of an image where none are asked for."""
    steps: int
    """Noise levels that the model was trained with: no call can take more steps."""

    @classmethod
    def open(cls, folder: Path) -> PipelineFolder:
        """LoadError names the file or the part that is missing, or cannot be served."""
        index = required(folder / "model_index.json", KIND)
        kind = index.get("_class_name")
        if not isinstance(kind, str) or kind not in PIPELINES:
            raise LoadError(f"{folder} holds a {kind!r:.80}; served are {', '.join(PIPELINES)}")
        for name, part in index.items():
            if isinstance(part, list) and not name.startswith("_"):
                _check_part(folder, name, part)
        found = cls._of(folder, kind)
        for what in ("multiple", "side", "steps"):
            if not 1 <= getattr(found, what) < 1 << 31:
                raise LoadError(f"{folder} makes no images: its configurations give a {what} of {getattr(found, what)}")
        return found

    @classmethod
    @values_of("one of the pipeline's configurations")
    def _of(cls, folder: Path, kind: str) -> PipelineFolder:
        denoiser = required(folder / PIPELINES[kind] / "config.json", KIND)
        vae = required(folder / "vae" / "config.json", KIND)
        scale = 2 ** (len(vae.get("block_out_channels") or [0] * 4) - 1)
        side = denoiser.get("sample_size") or 64
        steps = required(folder / "scheduler" / "scheduler_config.json", KIND).get("num_train_timesteps", 1000)
        multiple = lcm(STRIDE, scale * (denoiser.get("patch_size") or 1))
        return cls(kind, multiple, scale * int(side if isinstance(side, int) else max(side)), int(steps))

    @property
    def inpaints(self) -> bool:
        """Whether it can fill the masked part of an image."""
        return "PixArt" not in self.kind

    @property
    def only_inpaints(self) -> bool:
        """Whether it was trained for that alone."""
        return "Inpaint" in self.kind


def _check_part(folder: Path, name: str, part: list[Any]) -> None:
    library = part[0] if part else ""
    if library is None:  # left out on purpose
        return
    if library not in LIBRARIES:
        raise LoadError(
            f"{name!r:.80} of {folder} comes from {library!r:.80}: code that a checkpoint brings is not run"
        )
    if not os.path.isdir(folder / name):  # false, not an error, for a name that no file can have
        raise LoadError(f"{folder / name} is missing: the download is not complete")
    pickled = [file.name for file in (folder / name).iterdir() if file.suffix in PICKLED]
    if pickled and not any((folder / name).glob("*.safetensors")):
        raise LoadError(
            f"{folder / name} has {pickled[0]} but no safetensors: pickled weights can run code; convert them"
        )
