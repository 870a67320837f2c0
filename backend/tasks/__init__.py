"""Tasks of one answer a request: a file each, with its CPU half and what its ranks do with the model's output."""

from __future__ import annotations

from importlib import import_module
from typing import Any

TASKS = {
    "embed": "backend.tasks.embed:Embed",
    "classify": "backend.tasks.classify:Classify",
    "qa": "backend.tasks.qa:QuestionAnswering",
    "rerank": "backend.tasks.rerank:Rerank",
    "token_classification": "backend.tasks.token_classification:TokenClassification",
    "fill_mask": "backend.tasks.fill_mask:FillMask",
    "zero_shot_image": "backend.tasks.zero_shot_image:ZeroShotImage",
    "text_to_image": "backend.tasks.text_to_image:TextToImage",
}
"""Name of the model directory -> module:class."""


def find(task: str) -> Any:
    """The class of a task."""
    module, _, name = TASKS[task].partition(":")
    return getattr(import_module(module), name)
