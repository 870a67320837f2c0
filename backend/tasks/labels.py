"""What config.json says of a classifying head: its labels' names, and how scores are made of logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from backend.errors import LoadError
from backend.json_file import values_of
from backend.model_folder import Checkpoint
from backend.tasks.task import Array

MOST = 1 << 20
"""Labels: a list of them is made before any weight is read."""


def check_head(checkpoint: Checkpoint, head: str) -> None:
    """LoadError for a model of another head: both kinds of classifier have the same tensors, and would load."""
    named = checkpoint.architectures
    if named and not any(name.endswith(head) for name in named):
        raise LoadError(f"{checkpoint.folder} holds a {named[0]}, which is not a model for {head}")


def labels_of(checkpoint: Checkpoint) -> list[str]:
    """Names by number, as transformers makes them: LABEL_0 and so on where none are stated, two if no number is."""
    config = checkpoint.config
    named = config.get("id2label")
    if named is None:
        return [f"LABEL_{number}" for number in range(_count(config))]
    try:
        by_number = {int(number): str(name) for number, name in named.items()}
        return [by_number[number] for number in range(len(by_number))]
    except (AttributeError, ValueError, KeyError, OverflowError):
        raise LoadError(f"id2label of {checkpoint.folder / 'config.json'} does not name the labels 0, 1, ...") from None


@values_of("config.json")
def _count(config: dict[str, Any]) -> int:
    count = int(config.get("num_labels") or 2)
    if not 1 <= count <= MOST:
        raise LoadError(f"config.json: num_labels must be from 1 to {MOST}")
    return count


def scoring(config: dict[str, Any], labels: int) -> str:
    """softmax, sigmoid or none: the text-classification pipeline's rule."""
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or labels == 1 else "softmax"


def scores(logits: Array, kind: str) -> Array:
    """Along the last axis.  # [..., labels] -> [..., labels]"""
    if kind == "sigmoid":
        with np.errstate(over="ignore"):  # exp of a large number is infinite, and the score 0
            made: Array = 1.0 / (1.0 + np.exp(-logits))
            return made
    if kind == "softmax":
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        made = powers / powers.sum(-1, keepdims=True)
        return made
    return logits


def best(values: Array, most: int | None = None) -> list[int]:
    """Places of the highest values first, equal ones as they come; `most` of them.  # [n]"""
    places: list[int] = np.argsort(-values, kind="stable")[:most].tolist()
    return places
