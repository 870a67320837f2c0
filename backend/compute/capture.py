"""Capturing CUDA graphs so that one that CUDA refuses leaves torch as it was; it does not know what is captured."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED of the driver."""

_refused: list[torch.cuda.CUDAGraph] = []
"""Kept, since a pool of memory that no graph uses for a while cannot be used again."""


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None = None, mode: str = "global"
) -> Iterator[None]:
    """What is launched meanwhile goes into the graph; RuntimeError where CUDA refuses it.

    Without a stream of the caller's all such captures share one, after torch gave back the memory it caches.
    """
    if stream is None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        stream = side(torch.cuda.current_device())
    with torch.cuda.stream(stream):  # torch.cuda.graph would not go back from its stream after a refusal
        graph.capture_begin(pool=pool, capture_error_mode=mode)
        try:
            yield
        finally:
            try:
                graph.capture_end()
            except RuntimeError:
                _undo(graph, stream)
                raise


@cache
def side(device: int) -> torch.cuda.Stream:
    """Where all of a device's captures are made that share a pool: its memory serves one stream."""
    return torch.cuda.Stream(device)


def _undo(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """End an empty capture in place of the refused one.

    torch's capture_end undoes what capture_begin did only once CUDA has ended the capture (2.11, 2.13): till then
    random calls, replays of earlier graphs, captures into this pool and freeing cached memory all fail.
    """
    begin = ctypes.CDLL("libcuda.so.1").cuStreamBeginCapture_v2
    if begin(ctypes.c_void_p(stream.cuda_stream), RELAXED) == 0:
        with warnings.catch_warnings(action="ignore"):  # of its being empty
            graph.capture_end()
    _refused.append(graph)
