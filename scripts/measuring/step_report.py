"""bench_steps' run: loads, asks for one case after the other, prints each at once. It does not time anything itself."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring.floors import Ceiling, cache_seconds, ceiling, step_seconds
from measuring.packed_report import packed
from measuring.report import Report
from measuring.shapes import Shape, make_shape
from measuring.start import BESIDE, LIMIT, config_of, started

LINES = 15


def run(options: argparse.Namespace) -> None:
    """Everything that was asked for."""
    parts = options.parts.split(",")
    report = Report(options.json)
    limit = devices(report, options, parts)
    if "packed" in parts and limit is not None:
        packed(report, options, limit)
    if {"prefill", "decode", "sampled"} & set(parts):
        for kind in options.quantization.split(","):
            options.quantization = "" if kind == "none" else kind
            report.attempt(kind or "the model", lambda: model(report, options, parts, limit))
    if report.failed:
        raise SystemExit("bench_steps: failed: " + ", ".join(report.failed))


def model(report: Report, options: argparse.Namespace, parts: list[str], limit: Ceiling | None) -> None:
    """The steps of --shape or --model."""
    if not (options.model or options.shape):
        raise SystemExit("bench_steps: --shape or --model is missing")
    start = time.perf_counter()
    folder = options.model or str(make_shape(options.shape))
    print(f"\n{folder}: made or found in {time.perf_counter() - start:.1f} s", flush=True)
    Steps(options, folder, report, limit).run(parts)


def devices(report: Report, options: argparse.Namespace, parts: list[str]) -> Ceiling | None:
    """Print what the GPU reaches; the ceiling that floors are computed with, None on CPU."""
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        print("no GPU: times only, without floors, attention and profiles")
        return None
    name = torch.cuda.get_device_name()
    limit = ceiling(name)
    report.about |= {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    print(f"{name}, torch {torch.__version__}; floors: {limit}")
    if "ceilings" in parts or limit is None:
        limit = _ceilings(report) if limit is None else (_ceilings(report), limit)[1]
    if "attention" in parts:
        attention(report, limit)
    return limit


def _ceilings(report: Report) -> Ceiling:
    from measuring.ceilings import measured

    found = measured()
    report.head("Measured ceilings", "what", "copy TB/s", "bf16 TFLOP/s")
    report.row({"what": "ceilings", "copy TB/s": found.bandwidth / 1e12, "bf16 TFLOP/s": found.flops / 1e12})
    return found


def attention(report: Report, limit: Ceiling) -> None:
    """The decode kernel alone."""
    import torch

    from measuring.attention import CASES, Heads, measure

    report.head(
        "Paged decode attention, 32 heads on 8, dim 128, bf16", "call", "batch", "context", "µs", "GB/s", "of floor"
    )
    for batch, context in CASES:
        got = report.attempt(f"attention {batch}", lambda: measure(batch, context))  # noqa: B023 (called at once)
        if got is None:
            continue
        torch.cuda.empty_cache()
        floor = cache_seconds(batch * context, Heads.kv, Heads.dim, limit)
        report.row({
            "call": got.call, "batch": batch, "context": context, "µs": got.seconds * 1e6,
            "GB/s": got.bandwidth / 1e9, "of floor": floor / got.seconds,
        })  # fmt: skip


class Steps:
    """One model's steps."""

    def __init__(self, options: argparse.Namespace, folder: str, report: Report, limit: Ceiling | None) -> None:
        self._options, self._report, self._limit = options, report, limit
        self._shape = Shape.of(folder)
        self._batches = sorted(map(int, options.batches.split(",")))
        self._config = config_of(options, folder, self._batches)
        self._profiled = set(filter(None, options.profile.split(",")))
        report.about |= {"model": options.shape or Path(folder).name, "tp": self._config.tensor_parallel}
        report.about |= {"quantization": self._config.quantization, "set": options.set}

    def run(self, parts: list[str]) -> None:
        """All clocks first: a profiler that has been on once may slow launches down."""
        self._ranks, blocks = started(self._config)
        try:
            self._play = self._limits(blocks)
            self._fill()
            seconds: dict[str, tuple[Any, float]] = {}
            if "prefill" in parts:
                seconds |= self._prefill()
            for way in ("decode", "sampled"):
                if way in parts:
                    seconds |= self._decode(way)
            if self._limit:
                self._traces(seconds)
        finally:
            self._ranks.close()

    def _limits(self, blocks: int) -> Any:
        """The schedules' cache: as much as the largest batch needs, all of which `_fill` writes."""
        from measuring.schedules import Play

        options, config = self._options, self._config
        needed = (options.context + options.steps) // config.block_size + 3
        most = max(self._batches[-1], BESIDE) * needed + 2 * options.prompt // config.block_size
        return Play(min(blocks, most), config.block_size, config.step_tokens, config.max_sequences, self._shape.vocab)

    def _case(self, kind: str, batch: int, steps: int, **changes: Any) -> Any:
        from measuring.step_worker import Case

        return Case(kind, batch, self._options.context, steps, replace(self._play, **changes), self._options.prompt)

    def _asked(self, method: str, case: Any) -> list[Any]:
        answers: list[Any] = self._ranks.call(method, case, timeout=LIMIT)
        return answers

    def _fill(self) -> None:
        """Real keys and values everywhere: a memory full of zeros is not what a server reads."""
        if self._limit:
            start, play = time.perf_counter(), self._play
            steps = play.num_blocks * play.block_size // play.step_tokens
            self._asked("play", self._case("prefill", 0, steps))
            print(f"cache filled in {time.perf_counter() - start:.1f} s", flush=True)

    def _decode(self, way: str) -> dict[str, tuple[Any, float]]:
        changes = {"temperature": 0.8, "top_p": 0.9} if way == "sampled" else {}
        self._head(f"Decode, context {self._options.context}, {changes or 'greedy'}")
        found: dict[str, tuple[Any, float]] = {}
        for batch in self._batches:
            needed = batch * ((self._options.context + self._options.steps) // self._config.block_size + 3)
            if needed > self._play.num_blocks:
                print(f"batch {batch}: does not fit into {self._play.num_blocks} KV blocks")
                continue
            name, case = f"{way} {batch}", self._case("decode", batch, self._options.steps, **changes)
            self._clocked(name, case, batch, found)
        return found

    def _prefill(self) -> dict[str, tuple[Any, float]]:
        self._head(f"Prefill, steps of {self._config.step_tokens} tokens, prompts of {self._options.prompt}")
        found: dict[str, tuple[Any, float]] = {}
        for running in (0, BESIDE):
            name = f"prefill beside {running}" if running else "prefill"
            case = self._case("prefill", running, min(8, self._options.steps))
            self._clocked(name, case, self._config.step_tokens, found)
        return found

    def _head(self, title: str) -> None:
        self._report.head(title, "what", "ms", "p99 ms", "host ms", "tok/s", "floor ms", "of floor")

    def _clocked(self, name: str, case: Any, tokens: int, found: dict[str, tuple[Any, float]]) -> None:
        """Print a case; into `found` goes its seconds a step."""
        if not (answers := self._report.attempt(name, lambda: self._asked("measure", case))):
            return
        timed = answers[0]
        floor = self._floor(timed)
        self._report.row({
            "what": name, "ms": 1e3 * timed.seconds, "p99 ms": 1e3 * timed.slowest, "host ms": 1e3 * timed.host,
            "tok/s": tokens / timed.seconds, "floor ms": 1e3 * floor if floor else None,
            "of floor": floor / timed.seconds if floor else None,
        })  # fmt: skip
        found[name] = case, timed.seconds

    def _floor(self, timed: Any) -> float | None:
        if self._limit is None:
            return None
        size, kind = 4 if self._config.dtype == "float32" else 2, self._config.quantization
        packed_size = {"": float(size), "int4": 0.5}.get(kind, 1.0)  # scales are left out
        kept, world = 1 if self._config.kv_cache_dtype == "fp8" else size, self._config.tensor_parallel
        each = [
            step_seconds(self._shape, list(step), self._limit, world, size, packed_size, kept) for step in timed.steps
        ]
        return sum(each) / len(each)

    def _traces(self, seconds: dict[str, tuple[Any, float]]) -> None:
        """The GPU's part of every case; then the kernels of those that were asked for."""
        self._report.head("Under the profiler, per step", "what", "busy ms", "idle", "traced ms", "waits")
        kept = {}
        for name, (case, wall) in seconds.items():
            if not (answers := self._report.attempt(f"trace of {name}", lambda: self._asked("trace", case))):  # noqa: B023
                continue
            traced = answers[0]
            use = traced.use
            self._report.row({
                "what": name, "busy ms": use.busy / 1e3, "idle": max(0.0, 1 - use.busy / 1e6 / wall),
                "traced ms": use.span / 1e3, "waits": use.waiting / use.span if use.span else None,
            })  # fmt: skip
            if name.removeprefix("decode ") in self._profiled:
                kept[name] = traced
        for name, traced in kept.items():
            self._kernels(name, traced)

    def _kernels(self, name: str, traced: Any) -> None:
        busy = sum(line.total for line in traced.lines)
        self._report.head(f"Kernels of {name}, per step", "kernel", "count", "µs each", "µs", "share")
        for line in traced.lines[:LINES]:
            self._report.row({
                "kernel": _short(line.name), "count": line.count / traced.steps, "µs each": line.total / line.count,
                "µs": line.total / traced.steps, "share": line.total / busy,
            }, {"what": name})  # fmt: skip
        left = traced.lines[LINES:]
        print(f"and {len(left)} more names, {sum(line.total for line in left) / traced.steps:.1f} µs")


def _short(name: str, width: int = 90) -> str:
    plain = name.replace("|", "/").removeprefix("void ")
    return plain if len(plain) <= width else plain[: width - 30] + "…" + plain[-29:]
