"""CUDA graphs of a pipeline's models: one launch a call in place of a thousand. It knows no pipeline.

The images are the same up to rounding: a library may choose other kernels while it is captured (transformers gives
masks that it otherwise leaves out). A graph holds for one set of shapes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from backend.compute.capture import capturing

MOST = 16
"""Graphs of a model that are kept: batch sizes times image sizes."""

HOST_STEPS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "PNDMScheduler",
)
"""Schedulers that look their timesteps up in tables on the host: with timesteps there they wait for no device."""

PLAIN = object()
"""Stands for a graph that could not be captured."""


class ForwardGraphs:
    """Stands for a model's `forward`. The first call of some shapes runs as it is, the second is captured."""

    def __init__(self, model: nn.Module, device: torch.device, pool: Any, say: Callable[[str], None]) -> None:
        self._forward, self._device, self._pool, self._say = model.forward, device, pool, say
        self._graphs: OrderedDict[Any, Any] = OrderedDict()
        model.forward = self  # as the pipeline calls it

    def __call__(self, *values: Any, **named: Any) -> Any:
        leaves, shape = tree_flatten((values, named))
        key = (str(shape), *(signature(leaf) for leaf in leaves))
        met = key in self._graphs
        graph = self._graphs.setdefault(key, None)
        self._graphs.move_to_end(key)
        if len(self._graphs) > MOST:
            self._graphs.popitem(last=False)
        if met and graph is None:
            graph = self._graphs[key] = self._capture(leaves, shape)
        if graph is None or graph is PLAIN:
            return self._plain(leaves, shape)
        return graph.replay(leaves)

    def without(self, *values: Any, **named: Any) -> Any:
        """The same answer, by no graph."""
        return self._plain(*tree_flatten((values, named)))

    def _plain(self, leaves: list[Any], shape: Any) -> Any:
        here = [leaf.to(self._device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        values, named = tree_unflatten(here, shape)
        return self._forward(*values, **named)

    def _capture(self, leaves: list[Any], shape: Any) -> Any:
        try:
            return _Graph(self._forward, [_own(leaf, self._device) for leaf in leaves], shape, self._pool)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            self._say(f"no CUDA graph of {type(self._forward).__name__}: {' '.join(str(error).split())[:200]}")
            return PLAIN


class _Graph:
    """One captured call with inputs of its own."""

    def __init__(self, forward: Any, inputs: list[Any], shape: Any, pool: Any) -> None:
        self._inputs = inputs
        values, named = tree_unflatten(inputs, shape)
        self._graph = torch.cuda.CUDAGraph()
        with capturing(self._graph, pool):
            output = forward(*values, **named)
        self._found, self._shape = tree_flatten(output)
        if strange := [type(each).__name__ for each in self._found if not isinstance(each, Tensor | None)]:
            raise TypeError(f"it answers with a {strange[0]}, which a replay would not renew")

    def replay(self, leaves: list[Any]) -> Any:
        """The model's answer to these inputs, in memory of its own."""
        for own, leaf in zip(self._inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                _renew(own, leaf)
        self._graph.replay()
        return tree_unflatten([each.clone() if isinstance(each, Tensor) else each for each in self._found], self._shape)


def _own(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device, copy=True).contiguous() if isinstance(leaf, Tensor) else leaf


def _renew(own: Tensor, leaf: Tensor) -> None:
    """Give a graph's input its value. One number of the host's goes along with a launch; a copy of it could wait."""
    if leaf.device.type == "cpu" and leaf.numel() and not any(leaf.stride()):
        own.fill_(leaf[(0,) * leaf.ndim].item())
    else:
        own.copy_(leaf)


def signature(leaf: Any) -> Any:
    """What a graph depends on: a tensor's form, anything else's value."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, int | float | str | bool | None) else id(leaf)


def keep_steps_on_host(scheduler: Any) -> None:
    """Leave the timesteps in host memory, where the scheduler's tables are: else each step would wait for a copy."""
    if type(scheduler).__name__ not in HOST_STEPS:
        return
    usual = scheduler.set_timesteps

    @wraps(usual)  # pipelines look at its signature
    def set_timesteps(*values: Any, device: Any = None, **named: Any) -> None:
        usual(*values, **named)

    scheduler.set_timesteps = set_timesteps
