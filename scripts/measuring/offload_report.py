"""bench_offload's run: one model, its layers elsewhere, and what a step takes against the time the weights need."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from backend.config import EngineConfig
from backend.devices import free_host_memory, resolved
from backend.generation.capacity import share
from backend.ranks.group import environment
from backend.ranks.rank import Birth
from measuring.hollow import make_hollow
from measuring.report import Report
from measuring.shapes import SHAPES, Shape

ROOM = 0.85
"""Share of the free memory, or of the free disk, that the layers may take."""


def run(options: argparse.Namespace) -> None:
    """Everything that was asked for."""
    shape, report = SHAPES[options.shape], Report(options.json)
    layers = options.layers = fitting(shape, options)
    print(f"{layers} of {options.shape}'s {shape.layers} layers", flush=True)
    with tempfile.TemporaryDirectory(prefix="tritonspeed-hollow-") as folder:
        config = config_of(options, make_hollow(shape, layers, Path(folder)))
        os.environ.update(environment(config, 0))
        Steps(config, options, report).run()
    if report.failed:
        raise SystemExit("bench_offload: failed: " + ", ".join(report.failed))


def fitting(shape: Shape, options: argparse.Namespace) -> int:
    """As many layers as there is room for, --layers at the most."""
    folder = options.offload_folder or tempfile.gettempdir()
    free = free_host_memory() if options.offload == "cpu" else shutil.disk_usage(folder).free
    size = {"int4": 0.63, "int8": 1.07, "fp8": 1.01}.get(options.quantization, 2.0)
    room = int(free * ROOM / (shape.layer_parameters / shape.layers * size))
    return max(4, min(options.layers or shape.layers, room))


def config_of(options: argparse.Namespace, folder: Path) -> EngineConfig:
    most = max(map(int, options.batches.split(",")))
    given = {
        "model": str(folder), "device": options.device, "offload": options.offload, "max_sequences": str(most),
        "offload_folder": options.offload_folder, "device_memory": str(options.device_memory),
        "quantization": options.quantization, "dtype": options.dtype,
    }  # fmt: skip
    return resolved(EngineConfig.from_parameters({**given, **dict(pair.split("=", 1) for pair in options.set)}))


class Steps:
    """One model's decode steps."""

    def __init__(self, config: EngineConfig, options: argparse.Namespace, report: Report) -> None:
        import torch

        from measuring.offload_worker import OffloadWorker

        torch.set_num_threads(config.threads)
        self._options, self._config, self._report = options, config, report
        self._worker = OffloadWorker(Birth("", config, 0, 1, "", os.getpid()), lambda line: print(line, flush=True))
        report.about |= {"shape": options.shape, "layers": options.layers, "offload": options.offload}
        report.about |= {"quantization": options.quantization}

    def run(self) -> None:
        self._blocks, longest = share(self._config, [self._worker.capacity()])
        self._worker.allocate(self._blocks, longest)
        self._worker.warm_up()
        link, alone = self._worker.link(), self._worker.alone()
        floor = self._worker.moved / (link if self._options.offload == "cpu" else alone)
        print(f"one large copy {link / 1e9:.1f} GB/s; all layers without computing {alone / 1e9:.1f} GB/s")
        print(f"{self._worker.moved / 1e9:.1f} GB a step: at least {1e3 * floor:.0f} ms")
        self._report.head(f"Decode, context {self._options.context}", "batch", "ms", "tok/s", "floor ms", "of floor")
        for batch in map(int, self._options.batches.split(",")):
            self._decode(batch, floor)

    def _decode(self, batch: int, floor: float) -> None:
        if not (case := self._case(batch)):
            print(f"batch {batch}: does not fit into {self._blocks} KV blocks")
            return
        if timed := self._report.attempt(f"batch {batch}", lambda: self._worker.measure(case)):
            self._report.row({
                "batch": batch, "ms": 1e3 * timed.seconds, "tok/s": batch / timed.seconds,
                "floor ms": 1e3 * floor, "of floor": floor / timed.seconds,
            })  # fmt: skip

    def _case(self, batch: int) -> Any:
        from measuring.schedules import Play
        from measuring.step_worker import Case

        config, options = self._config, self._options
        needed = batch * ((options.context + options.steps) // config.block_size + 3)
        if needed > self._blocks:
            return None
        play = Play(
            self._blocks, config.block_size, config.step_tokens, config.max_sequences, SHAPES[options.shape].vocab
        )
        return Case("decode", batch, options.context, options.steps, play)
