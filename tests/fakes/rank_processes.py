"""Calls a function in ranks, processes of their own that are joined on CPU, and hands back what each rank returned."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from backend.compute.tensor_parallel import connect
from backend.ranks.rank import die_with

LIMIT = 240
"""Seconds for a group; a first one compiles DeepSpeed's operator."""
MOMENT = 10
"""Seconds that the others have when a rank has failed: they may wait for it and never learn."""


class Ranks:
    """`world` ranks that have been started, each to call `function(rank, world, *arguments)` and end.

    The function must be one that a new process can import.
    """

    def __init__(self, world: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tritonspeed-tested-ranks-"))
        context, parent = multiprocessing.get_context("spawn"), os.getpid()
        self._processes: list[BaseProcess] = [
            context.Process(target=_live, args=(self._folder, parent, function, rank, world, arguments), daemon=True)
            for rank in range(world)
        ]
        try:
            for process in self._processes:
                process.start()
        except BaseException:
            self._end()
            raise

    def results(self) -> list[Any]:
        """Wait for the ranks; what they returned, by rank. AssertionError with each rank's end unless all went well."""
        try:
            self._wait()
            if any(process.exitcode != 0 for process in self._processes):
                raise AssertionError(self._ends())
            return [torch.load(_answer(self._folder, rank), weights_only=False) for rank in range(self._world)]
        finally:
            self._end()

    @property
    def _world(self) -> int:
        return len(self._processes)

    def _wait(self) -> None:
        end = time.monotonic() + LIMIT
        while running := [process.sentinel for process in self._processes if process.exitcode is None]:
            if any(process.exitcode for process in self._processes):
                end = min(end, time.monotonic() + MOMENT)
            left = end - time.monotonic()
            if left <= 0:
                return
            wait(running, left)

    def _ends(self) -> str:
        """How each rank ended, in a line, and what was raised there."""
        ends = [f"rank {rank} {_how(process.exitcode)}" for rank, process in enumerate(self._processes)]
        errors = [_error(self._folder, rank) for rank in range(self._world)]
        raised = [f"rank {rank}: {file.read_text()}" for rank, file in enumerate(errors) if file.exists()]
        return "\n\n".join(["; ".join(ends), *raised])

    def _end(self) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _how(code: int | None) -> str:
    if code is None:
        return "was still running and has been killed"
    return f"ended with exit code {code}" + (f" ({signal.Signals(-code).name})" if code < 0 else "")


def _answer(folder: Path, rank: int) -> Path:
    return folder / f"answer-{rank}.pt"


def _error(folder: Path, rank: int) -> Path:
    return folder / f"error-{rank}.txt"


def _live(
    folder: Path, parent: int, function: Callable[..., Any], rank: int, world: int, arguments: tuple[Any, ...]
) -> None:
    """A rank's life. It ends as a server's ranks do, without destructors.

    gloo's threads outlive even destroy_process_group(): one that drops a tensor while Python finalises wants its lock,
    is told to exit in the middle of a destructor, and C++ aborts the process.
    """
    code = 1
    try:
        die_with(parent)
        torch.set_num_threads(1)
        connect(rank, world, torch.device("cpu"), folder)
        torch.save(function(rank, world, *arguments), _answer(folder, rank))
        code = 0
    except BaseException:
        _error(folder, rank).write_text(traceback.format_exc())
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
