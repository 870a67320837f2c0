"""A tiny model of random weights for any task of one answer a request, and what its config.pbtxt says of a request.

All of it follows from the table of tasks, but for the numbers of labels.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import tiny_encoders

from backend.tasks import find

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
LABELS = {"classify": 3, "rerank": 1}
"""How many a task's model has, where that is not transformers' default."""

TENSOR = re.compile(r'name: "(\w+)" data_type: TYPE_(\w+) dims: \[ (-?1) \]( optional: true)?')


def write(task: str, folder: Path) -> Path:
    """A folder that the task takes."""
    if task == "text_to_image":
        import tiny_diffusion

        return tiny_diffusion.save("sd", folder)
    if task == "zero_shot_image":
        import tiny_clip

        return tiny_clip.write_clip(folder)
    labels = {"num_labels": LABELS[task]} if task in LABELS else {}
    return tiny_encoders.write(folder, "bert", find(task).auto, **labels)


@cache
def inputs(task: str) -> list[tuple[str, str, str]]:
    """Name, type and dims of each."""
    return [found[:3] for found in _tensors(task)[0]]


@cache
def required(task: str) -> dict[str, bool]:
    """The inputs that may not be left out, in order: whether each is a list."""
    return {name: dims == "-1" for name, _, dims, optional in _tensors(task)[0] if not optional}


@cache
def outputs(task: str) -> list[str]:
    return [found[0] for found in _tensors(task)[1]]


def arguments(task: str, text: Any = "a", image: bytes = b"x") -> list[Any]:
    """What our client's pipeline is called with, at the least: the required inputs, in their order."""
    values = {name: image if "image" in name else text for name in required(task)}
    return [[value] if required(task)[name] else value for name, value in values.items()]


def _tensors(task: str) -> list[list[tuple[str, ...]]]:
    """Of the inputs and of the outputs."""
    text = (REPOSITORY / task / "config.pbtxt").read_text()
    return [TENSOR.findall(part) for part in text.split("output [")]
