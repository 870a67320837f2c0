"""zero_shot_image: an image and labels in, how well each label fits out. It does not know how a model sees.

Its answers are those of transformers' zero-shot-image-classification pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError, ServingError
from backend.generation.tokenizer import Tokenizer
from backend.model_folder import Checkpoint
from backend.quantized_form import kind_of
from backend.tasks.pictures import read
from backend.tasks.task import Array, Row, check_bytes, filled, text_of, texts, texts_of

TEMPLATE = "This is a photo of {}."
FAMILIES = ("clip",)
IMAGES = 32
"""Images that are computed together."""
NARROWEST = 100
"""How many times longer one side of an image may be: models enlarge the shorter side to what they look at."""


@dataclass(frozen=True)
class Item:
    pixels: NDArray[np.uint8]  # [height, width, 3]
    labels: list[str]
    sentences: list[str]


@dataclass(frozen=True)
class Pictured:
    """An image and its labels' sentences as tokens."""

    pixels: NDArray[np.uint8]  # [height, width, 3]
    sentences: list[tuple[int, ...]]


class ZeroShotImage:
    """Labels of images."""

    worker: ClassVar[str] = "backend.compute.images.clip:Clip"

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        config.refuse("CLIP is served in dtype, on the device", "quantization", "offload")
        self.config, checkpoint = config, Checkpoint.open(folder)
        if kind_of(checkpoint):
            raise LoadError("quantization_config: CLIP that is quantized already is not served")
        if checkpoint.model_type not in FAMILIES:
            raise LoadError(f"{checkpoint.model_type} cannot be served for zero_shot_image: only {', '.join(FAMILIES)}")
        self.tokenizer = Tokenizer.from_folder(folder)
        self.longest = checkpoint.max_model_len or 77
        self.padding = self.tokenizer.token_id(self.tokenizer.special_tokens.get("pad_token", "")) or 0

    def parse(self, row: Row) -> Item:
        if "image" not in row:
            raise InvalidInput("image is missing")
        labels = self._labels(row)
        template = self._template(row, len(labels)) if "hypothesis_template" in row else TEMPLATE
        pixels = read(row["image"], "image", "RGB", self.config.max_pixels)
        if max(pixels.shape[:2]) > NARROWEST * min(pixels.shape[:2]):
            raise InvalidInput(
                f"image has {pixels.shape[1]} x {pixels.shape[0]} pixels: one side may be {NARROWEST} times the other"
            )
        return Item(pixels, labels, [template.replace("{}", label) for label in labels])

    def _template(self, row: Row, times: int) -> str:
        limit = self.config.max_prompt_bytes
        template = text_of(row, "hypothesis_template", limit)
        if "{}" not in template:
            raise InvalidInput("hypothesis_template must hold {} in the label's place")
        check_bytes("hypothesis_template, repeated for each of labels,", [template] * times, limit)
        return template

    def _labels(self, row: Row) -> list[str]:
        labels = texts_of(row, "labels", self.config.max_texts, self.config.max_prompt_bytes)
        if not all(labels):
            raise InvalidInput("labels: none may be empty")
        return labels

    def prepare(self, items: Sequence[Item]) -> list[list[Pictured] | ServingError]:
        return [self._piece(item) for item in items]

    def _piece(self, item: Item) -> list[Pictured] | ServingError:
        sentences = [tuple(each.ids) for each in self.tokenizer.encodings(item.sentences)]
        longest = max(range(len(sentences)), key=lambda index: len(sentences[index]))
        if (tokens := len(sentences[longest])) > self.longest:
            return InvalidInput(
                f"labels: {item.labels[longest]!r:.80} makes {tokens} tokens, the model takes {self.longest}"
            )
        return [Pictured(item.pixels, sentences)]

    def cut(self, pieces: Sequence[Pictured]) -> list[list[int]]:
        """In order; so many images whose different sentences keep within the token budget, or one."""
        batches: list[list[int]] = []
        sentences: set[tuple[int, ...]] = set()
        for index, piece in enumerate(pieces):
            both = sentences.union(piece.sentences)
            fits = len(both) * max(map(len, both)) <= self.config.step_tokens
            if batches and len(batches[-1]) < IMAGES and fits:
                batches[-1].append(index)
                sentences = both
            else:
                batches.append([index])
                sentences = set(piece.sentences)
        return batches

    def batch(self, pieces: Sequence[Pictured]) -> dict[str, Any]:
        """Each sentence once; `columns` says which are an image's."""
        different = {sentence: at for at, sentence in enumerate(dict.fromkeys(s for p in pieces for s in p.sentences))}
        return {
            "images": [piece.pixels for piece in pieces],
            "ids": filled([*different], self.padding, np.int64),  # [sentences, longest]
            "lengths": np.array([*map(len, different)]),
            "columns": [[different[sentence] for sentence in piece.sentences] for piece in pieces],
        }

    def join(self, answers: list[Any]) -> list[Array]:
        """All ranks answer alike."""
        first: list[Array] = answers[0]
        return first

    def finish(self, item: Item, pieces: Sequence[Pictured], answers: Sequence[Array]) -> list[tuple[str, float]]:
        if not np.isfinite(answers[0]).all():
            raise ServingError("the model's scores are not numbers; load it with dtype bfloat16 or float32")
        order = np.argsort(-answers[0], kind="stable")
        return [(item.labels[index], float(answers[0][index])) for index in order]

    def outputs(self, results: Sequence[Sequence[tuple[str, float]]]) -> dict[str, Array]:
        return {
            "label": texts([[label for label, _ in row] for row in results]),
            "score": filled([[score for _, score in row] for row in results], 0.0, np.float32),
        }
