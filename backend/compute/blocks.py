"""Blocks: decoder layers of a known structure, computed by fused kernels in place of transformers' code.

It knows no family. A layer that qualifies is tried beside the original on the same input, and one that differs keeps
transformers' code. So a wrong guess costs speed, never a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backend.compute.all_reduce import Sums, sums
from backend.compute.attention.base import Rule
from backend.compute.attention.step import Step
from backend.compute.cache import KVCache, LayerSpec
from backend.compute.dense.base import Ops, ops
from backend.compute.layer_parts import Parts, parts_of
from backend.compute.norms import Norm
from backend.compute.quantized.packed import Packed
from backend.generation.plan import Plan


def pays(device: torch.device) -> bool:
    """Whether fused kernels are faster: on CPU the same operations in torch gain nothing."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Part:
    """What this rank's columns give of an update: the sum over all ranks is still to be made."""

    values: Tensor


Update = Tensor | Part | None
"""To be added to the hidden states; None: nothing is left to add."""


class Block:
    """Stands for a decoder layer's forward; its hidden states are changed in place."""

    def __init__(self, layer: int, parts: Parts, rule: Rule, between: Sums | None, device: torch.device) -> None:
        """`between`: how ranks sum, where there are several."""
        self._layer, self._parts, self._rule, self._between = layer, parts, rule, between
        self._ops: Ops = ops(device.type)
        self.following: Block | None = None
        """The block that gets this one's last product, to add it in the kernel of its first norm."""
        self._pending: Update = None

    def __call__(self, hidden_states: Tensor, *, position_embeddings: Any, step: Step, **_: Any) -> Tensor:
        """# [1, tokens, hidden] -> the same, less what the following block will add"""
        hidden = hidden_states[0]
        before_attention, after_attention, before_mlp, after_mlp = self._parts.norms
        pending, self._pending = self._pending, None
        attended = self._attend(hidden, pending, before_attention, position_embeddings, step)
        update = self._out(self._parts.attention_out, attended, hidden, not after_attention)
        if after_attention:
            update = self._normed(None, update, after_attention)
        update = self._mlp(hidden, update, before_mlp, not after_mlp)
        if after_mlp:
            update = self._normed(None, update, after_mlp)
        if self.following:
            self.following._pending = update
        elif isinstance(update, Part):
            self._sums.add(hidden, update.values)
        elif update is not None:
            hidden += update
        return hidden[None]

    def _attend(
        self, hidden: Tensor, update: Update, norm: Norm | None, rotation: tuple[Tensor, Tensor], step: Step
    ) -> Tensor:
        """# [tokens, hidden] -> [tokens, heads * head dim]"""
        parts, merged = self._parts, self._parts.query_key_value.group
        projected = self._project(hidden, update, norm, merged.weight, merged.bias)
        cos, sin = (each[0] for each in rotation)
        kv = step.cache.layers[self._layer]
        query = self._ops.roped(projected, cos, sin, kv, step.kv_slots, parts.heads, parts.head_norms, parts.eps)
        return step.read(self._layer, query, self._rule).flatten(1)

    def _project(
        self,
        hidden: Tensor,
        update: Update,
        norm: Norm | None,
        weight: Tensor | Packed,
        bias: Tensor | None,
        activation: str | None = None,
    ) -> Tensor:
        """The (gated) projection of the normed sum of hidden and update; hidden becomes that sum."""
        assert norm is not None
        few = len(hidden) <= self._ops.few(weight)
        if few and update is None:  # no kernel of its own for the norm
            return self._ops.linear(hidden, weight, bias, None, (norm.weight, norm.eps), activation)
        normed = self._normed(hidden, update, norm)
        if few:
            return self._ops.linear(normed, weight, bias, None, None, activation)
        projected = self._ops.product(normed, weight, bias)
        return projected if activation is None else self._ops.gated(projected, activation)

    def _out(self, projection: Any, values: Tensor, hidden: Tensor, plain: bool) -> Update:
        """The projection of all ranks' values, to be added to hidden; None where that is already done."""
        weight, bias = projection.weight, projection.bias
        if self._between is None and plain and len(values) <= self._ops.few(weight):
            self._ops.linear(values, weight, bias, hidden, None, None)
            return None
        if self._between is None:
            return projected(values, weight, bias)
        part = projected(values, weight, None)
        return Part(part) if bias is None else self._between.total(part).add_(bias)

    def _mlp(self, hidden: Tensor, update: Update, norm: Norm | None, plain: bool) -> Update:
        parts = self._parts
        assert norm is not None
        if parts.gate_up is None or parts.mlp_out is None:
            found: Tensor = parts.mlp(self._normed(hidden, update, norm)[None])
            return found[0]
        merged = parts.gate_up.group
        gated = self._project(hidden, update, norm, merged.weight, merged.bias, parts.activation)
        return self._out(parts.mlp_out, gated, hidden, plain)

    def _normed(self, hidden: Tensor | None, update: Update, norm: Norm) -> Tensor:
        """The norm of their sum, which hidden becomes."""
        if isinstance(update, Part):
            return self._sums.normed(hidden, update.values, norm.weight, norm.eps)
        if hidden is None:
            assert update is not None
            return self._ops.normed(update, None, norm.weight, norm.eps)
        return self._ops.normed(hidden, update, norm.weight, norm.eps)

    @property
    def _sums(self) -> Sums:
        assert self._between is not None
        return self._between


def projected(hidden: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """As torch's linear, by the kernel for few rows where they are few.  # [..., hidden] -> [..., rows]"""
    dense, rows = ops(hidden.device.type), hidden.reshape(-1, hidden.shape[-1])
    if len(rows) > dense.few(weight):
        return dense.product(rows, weight, bias).view(*hidden.shape[:-1], -1)
    return dense.linear(rows, weight, bias, None, None, None).view(*hidden.shape[:-1], -1)


def layers_of(model: nn.Module, count: int) -> nn.ModuleList | None:
    """The stack of decoder layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return lists[0] if len(lists) == 1 else None


@contextmanager
def _watched(layers: list[Any]) -> Iterator[list[tuple[Tensor, dict[str, Any], Tensor]]]:
    """What each layer was called with, and what it gave."""
    seen: list[tuple[Tensor, dict[str, Any], Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        seen.append((hidden.clone(), {k: v for k, v in kwargs.items() if k != "hidden_states"}, result.clone()))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


TRIED = (24, 5)
"""Tokens of the trial steps: more than the kernels for few tokens take, and fewer."""
_CLOSE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
"""Differences allowed, relative to what the layer adds to its input."""


def install(model: Any, specs: list[LayerSpec], world: int, dtype: torch.dtype, device: torch.device) -> str:
    """Let every layer that qualifies be computed by a Block; what came of it, in words. All ranks call it together."""
    layers = layers_of(model, len(specs))
    if layers is None:
        return "transformers' code computes all layers: they are not one list"
    found = [parts_of(layer, spec) for layer, spec in zip(layers, specs, strict=True)]
    between, how = sums(model.config.get_text_config().hidden_size, dtype, device) if world > 1 else (None, "")
    blocks = {
        index: Block(index, parts, spec.rule, between, device)
        for index, (parts, spec) in enumerate(zip(found, specs, strict=True))
        if isinstance(parts, Parts) and spec.rule
    }
    reasons = {parts for parts in found if isinstance(parts, str)}
    agreeing = _tried(model, layers, blocks, KVCache(specs, 2, max(TRIED), dtype, device), world)
    if len(agreeing) < len(blocks):
        reasons.add("its result differs")
    for index in agreeing:
        layers[index].forward = blocks[index]
        blocks[index].following = blocks[index + 1] if index + 1 in agreeing else None
    return _told(len(agreeing), len(layers), reasons) + (how and f"; {how}")


def _told(count: int, of: int, reasons: set[str]) -> str:
    why = f"; transformers' code the others: {'; '.join(sorted(reasons))}" if reasons else ""
    return f"fused kernels compute {count} of {of} layers{why}"


@torch.inference_mode()
def _tried(model: Any, layers: Any, blocks: dict[int, Block], cache: KVCache, world: int) -> list[int]:
    """The blocks that give what their layers give."""
    good = torch.zeros(len(layers), dtype=torch.int32, device=cache.device)
    good[list(blocks)] = 1
    for tokens in TRIED if blocks else ():
        with _watched(list(layers)) as seen:
            ids = (torch.arange(tokens, device=cache.device) * 7919 % model.config.get_text_config().vocab_size)[None]
            positions = torch.arange(tokens, device=cache.device)[None]
            model(input_ids=ids, position_ids=positions, use_cache=False, step=_trial_step(cache, tokens))
        for index, block in blocks.items():
            good[index] *= _agrees(layers[index], block, *seen[index])
    if world > 1:
        torch.distributed.all_reduce(good, torch.distributed.ReduceOp.MIN)
    return [index for index, agrees in enumerate(good.tolist()) if agrees]


def _agrees(layer: Any, block: Block, hidden: Tensor, named: dict[str, Any], want: Tensor) -> bool:
    """Whether the block adds to `hidden` what its layer added; called as the layer, whose weights may have to come."""
    before, layer.forward = vars(layer).get("forward"), block
    try:
        result = layer(hidden.clone(), **named)
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
    error, added = (result - want).abs().max(), (want - hidden).abs().max()
    allowed = _CLOSE[want.dtype] * added + 2 * torch.finfo(want.dtype).eps * want.abs().max()
    return bool(error <= allowed)


def _trial_step(cache: KVCache, tokens: int) -> Step:
    """One sequence of `tokens` tokens in the first block."""
    at = np.arange(tokens)
    none: Any = None
    return Step.from_plan(
        Plan(
            input_ids=none, positions=none, kv_slots=at.astype(np.int64),
            query_starts=np.array([0, tokens], np.int32), kv_lengths=np.array([tokens], np.int32),
            block_tables=np.zeros((1, 1), np.int32), slots=none, rows=none, sampling=none,
        ),
        cache.device, cache,
    )  # fmt: skip
