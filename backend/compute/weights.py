"""Which checkpoint tensors make which parameter, and reading one rank's part of them; not how the model was sharded.

Names follow transformers' own conversion rules (renamed, prefixed or merged tensors), so both load the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from backend.compute.quantized.checkpoints.read import read
from backend.compute.quantized.packed import Packed
from backend.errors import LoadError
from backend.model_folder import Checkpoint

Cut = Callable[[torch.Tensor], torch.Tensor]

_LEFTOVERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$", r"\.(attn|attention)\.bias$")
"""Tensors that old checkpoints carry and models compute: never read."""


@dataclass
class Recipe:
    """The checkpoint tensors that one parameter, or several at once, are made of."""

    sources: dict[str, list[str]] = field(default_factory=dict)
    """Tensor names, by the pattern of the conversion that takes them."""
    converter: Any = None
    """transformers' WeightConverter; None where the tensor is the parameter."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of all the whole model's parameters: a part cut from a tensor too large would look right."""

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


@dataclass(frozen=True)
class Span:
    """A rank's part of a tensor along one dimension; -1 is all of it, which `cut` then cuts if there is one."""

    dimension: int = -1
    start: int = 0
    stop: int = 0
    cut: Cut | None = None

    def of(self, tensor: Any) -> torch.Tensor:
        """Take the part of a tensor, or of a safetensors slice, of which no more than this is then read."""
        if self.dimension == 0:
            part = tensor[self.start : self.stop]
        elif self.dimension == 1:
            part = tensor[:, self.start : self.stop]
        else:
            part = tensor[...]
        assert isinstance(part, torch.Tensor)
        return part if self.cut is None else self.cut(part)


WHOLE = Span()


def recipes(
    model: PreTrainedModel, checkpoint: Checkpoint, optional: Callable[[str], bool] = lambda name: False
) -> dict[str, Recipe]:
    """List recipes by the first parameter each makes. LoadError names a tensor that the model has no place for.

    `model` is whole: sharding changes neither names nor this. `optional` names tensors that may stay unused.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    targets: dict[str, Any] = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in targets.items()}
    prefix = model.base_model_prefix
    found: dict[str, Recipe] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            target, pattern = name, None
        if target in targets:
            if pattern is None:
                check_shape(target, checkpoint.tensors[name].shape, shapes)
            recipe = Recipe(converter=None if pattern is None else by_pattern[pattern], shapes=shapes)
            _add(found.setdefault(target, recipe), target, name, pattern)
        elif not (_ignored(name, model) or optional(name)):
            raise LoadError(f"tensor {name!r} of the checkpoint has no place in {type(model).__name__}")
    return found


def check_shape(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """LoadError unless a whole parameter has the shape that the model gives it."""
    if shapes.get(name, shape) != shape:
        raise LoadError(f"{name!r} is {list(shape)} in the checkpoint, {list(shapes[name])} in the model")


def _add(recipe: Recipe, target: str, name: str, pattern: str | None) -> None:
    if recipe.sources and (pattern is None or recipe.converter is None):
        raise LoadError(f"tensors {recipe.names[0]!r} and {name!r} of the checkpoint both make {target!r}")
    recipe.sources.setdefault(pattern or name, []).append(name)


def _ignored(name: str, model: PreTrainedModel) -> bool:
    patterns: Iterable[str] = [*_LEFTOVERS, *(model._keys_to_ignore_on_load_unexpected or ())]
    return any(re.search(pattern, name) for pattern in patterns)


class Reader:
    """Reads tensors of a checkpoint, memory mapped: the host holds one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def part(self, name: str, span: Span = WHOLE) -> torch.Tensor:
        """Read a part of a tensor onto the host, as stored; of a quantized layer's weight made full, in float32."""
        value = self.value(name, span)
        return value.full() if isinstance(value, Packed) else value

    def value(self, name: str, span: Span = WHOLE) -> torch.Tensor | Packed:
        """The same, but a quantized layer's weight as it is."""
        tensor = self.checkpoint.tensors[name]
        if tensor.form is None:
            return span.of(self._slice(name, tensor.file))
        files, ends = {part.name: part.file for part in tensor.parts}, [slice(0, size) for size in tensor.shape]
        if span.dimension >= 0:
            ends[span.dimension] = slice(span.start, span.stop)
        found = read(tensor, ends[0], ends[1], lambda part: self._slice(part, files[part]))
        if span.cut is None:
            return found
        numbers = torch.arange(tensor.shape[0], dtype=torch.float64)[:, None]
        return found.chosen(span.cut(numbers)[:, 0].long())  # DeepSpeed's rule for joined projections, of rows alone

    def _slice(self, name: str, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        return self._files[file].get_slice(name)

    def make(self, target: str, recipe: Recipe, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Whole parameters by name, through transformers' conversion; only where the recipe has one."""
        rule = deepcopy(recipe.converter)
        for pattern, names in recipe.sources.items():
            for name in names:
                rule.add_tensor(target, name, pattern, lambda name=name: self.part(name))
        made = rule.convert(target, model=model, config=model.config)
        values = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        for name, value in values.items():
            check_shape(name, tuple(value.shape), recipe.shapes)
        return values
