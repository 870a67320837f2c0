"""CUDA graphs of a pipeline's denoiser: one launch a step in place of a thousand. It knows no pipeline.

The same kernels run in the same order, so the images are the same. A graph holds for one set of shapes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

MOST = 16
"""Graphs that are kept: batch sizes times image sizes."""


class DenoiserGraphs:
    """Stands for the denoiser's `forward`. The first call of some shapes runs as it is, the second is captured."""

    def __init__(self, denoiser: nn.Module, device: torch.device) -> None:
        self._forward, self._device = denoiser.forward, device
        self._graphs: OrderedDict[Any, _Graph | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        denoiser.forward = self  # as the pipeline calls it

    def __call__(self, *values: Any, **named: Any) -> Any:
        leaves, shape = tree_flatten((values, named))
        leaves = [leaf.to(self._device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = (str(shape), *(signature(leaf) for leaf in leaves))
        if key not in self._graphs:
            self._graphs[key] = None
            if len(self._graphs) > MOST:
                self._graphs.popitem(last=False)
            values, named = tree_unflatten(leaves, shape)
            return self._forward(*values, **named)
        self._graphs.move_to_end(key)
        graph = self._graphs[key] = self._graphs[key] or _Graph(self._forward, leaves, shape, self._pool)
        return graph.replay(leaves)


class _Graph:
    """One captured call with inputs of its own."""

    def __init__(self, forward: Any, leaves: list[Any], shape: Any, pool: Any) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        values, named = tree_unflatten(self._inputs, shape)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = forward(*values, **named)

    def replay(self, leaves: list[Any]) -> Any:
        """The denoiser's answer to these inputs, in memory of its own."""
        for own, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(leaf)
        self._graph.replay()
        found, shape = tree_flatten(self._output)
        return tree_unflatten([each.clone() if isinstance(each, Tensor) else each for each in found], shape)


def signature(leaf: Any) -> Any:
    """What a graph depends on: a tensor's form, anything else's value."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype
    return leaf if isinstance(leaf, int | float | str | bool | None) else id(leaf)
