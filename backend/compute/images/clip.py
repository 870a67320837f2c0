"""Clip: a rank's worker that says how well sentences fit images, by transformers' own model. It knows no requests.

Several ranks split both towers' layers where that is exact; where it is not, each has the whole model and all compute
the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForZeroShotImageClassification, PreTrainedModel

from backend.compute.decoder import dtype_of
from backend.compute.split_loaded import split, unsplittable
from backend.compute.tensor_parallel import join
from backend.errors import LoadError, ServingError
from backend.model_folder import Checkpoint, resolve
from backend.ranks.rank import Birth


class Clip:
    """One rank's part of the model. Every rank gets every batch."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = birth.config
        self._device = join(birth, progress)
        folder = resolve(config.model, None)
        self._dtype = dtype_of(config, Checkpoint.open(folder))
        try:
            model, read = _load(folder, self._dtype)
        except (OSError, ValueError) as error:
            raise LoadError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:500]}") from None
        self._split = False
        if birth.world > 1:
            self._share(model, birth, progress if birth.rank == 0 else lambda text: None)
        self._model, self._read = model.to(self._device).eval(), read

    def _share(self, model: PreTrainedModel, birth: Birth, say: Callable[[str], None]) -> None:
        if reason := unsplittable(model, birth.world):
            say(f"the model is whole on every rank: {reason}")
        else:
            split(model, birth.rank, birth.world, self._device)
            self._split = True
            say(f"the model is split among {birth.world} ranks")

    def warm_up(self) -> None:
        """One image and one short sentence."""
        blank = np.zeros((64, 64, 3), np.uint8)
        self.forward({"images": [blank], "ids": np.array([[0, 1]]), "lengths": np.array([2]), "columns": [[0]]})

    def forward(self, batch: dict[str, Any]) -> list[NDArray[np.float32] | ServingError]:
        """The shares of each image's sentences, which add up to one.  # [sentences] an image

        Where there is no device memory, the same error for each image; on several ranks they then begin anew, since
        the others wait for this one's part.
        """
        try:
            return self._shares(batch)
        except torch.OutOfMemoryError:
            if self._split:
                raise
            count, texts = len(batch["images"]), len(batch["ids"])
            return [ServingError(f"no device memory for {count} images and {texts} labels; lower max_texts")] * count

    @torch.inference_mode()
    def _shares(self, batch: dict[str, Any]) -> list[NDArray[np.float32] | ServingError]:
        mask = np.arange(batch["ids"].shape[1]) < batch["lengths"][:, None]
        output = self._model(
            input_ids=torch.from_numpy(batch["ids"]).to(self._device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self._device),
            pixel_values=self._pixels(batch["images"]).to(self._device, self._dtype),
        )
        fits = output.logits_per_image.float().cpu()  # [images, sentences]
        return [row[own].softmax(-1).numpy() for row, own in zip(fits, batch["columns"], strict=True)]

    def _pixels(self, images: list[NDArray[np.uint8]]) -> Tensor:
        """As the model sees them, each by itself: they have sizes of their own.  # [images, 3, side, side]"""
        seen = [self._read(images=[Image.fromarray(image)], return_tensors="pt")["pixel_values"] for image in images]
        return torch.cat(seen)


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The folder's model and image processor: safetensors alone, nothing fetched, no code of the checkpoint's."""
    model, told = AutoModelForZeroShotImageClassification.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(told["missing_keys"]):
        raise LoadError(f"{folder} has no weights for {', '.join(missing)[:500]}")
    return model, AutoImageProcessor.from_pretrained(folder, local_files_only=True)
