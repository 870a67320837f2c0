"""Comparison: contenders on the same workloads, round after round, and what is printed and kept of it."""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from measuring.contenders import Engine, Server
from measuring.figures import Trace, figures
from measuring.floors import ceiling, device_name, workload_seconds
from measuring.peers import Peer
from measuring.shapes import Shape
from measuring.witness import measured
from measuring.workloads import Request, Workload

COLUMNS = ("tok/s", "req/s", "met/s", "ttft p50", "ttft p99", "tpot", "itl p50", "itl p99")
RATES = COLUMNS[:3]
GOODPUT = ("within", "refused")
"""Shares of the requests, where there are targets."""
SHARES = (*GOODPUT, "of floor")
SHARED = "0.25"
"""Of the free memory for each one's cache, where contenders share a device."""
MOST_TOGETHER = 256
"""Sequences in a step, as max_sequences is unless set."""
REFERENCES = ("transformers", "continuous")
WARM = 128
"""Tokens of output, at the most, of a request that warms up."""
ENOUGH = 128
"""Requests that warm up, at the most, but for twice those that come together."""
FEWER_BITS = ("quantization=", "kv_cache_dtype=")
"""Settings with which the floor, which is that of 16 bits, is none."""


class Contender(Protocol):
    def run(self, requests: list[Request], clients: int) -> list[Trace]: ...
    def close(self) -> None: ...


def made(name: str, options: argparse.Namespace, alone: bool) -> Contender:
    """A contender that is ready: server, engine, transformers or continuous, `:key=value` adding parameters."""
    kind, *changes = name.split(":")
    given = {**parameters(options, alone), **dict(pair.split("=", 1) for pair in changes)}
    kinds: dict[str, Callable[[], Contender]] = {
        "engine": lambda: Engine(given),
        "server": lambda: Server(given),
        "transformers": lambda: Peer("generate", given),
        "continuous": lambda: Peer("continuous", given, 0.0 if alone else float(SHARED)),
    }
    if kind not in kinds:
        raise SystemExit(f"bench: no contender {kind!r}; known: {', '.join(kinds)}, vllm")
    return kinds[kind]()


def parameters(options: argparse.Namespace, alone: bool) -> dict[str, str]:
    given = {"model": options.model, "tensor_parallel": str(options.tensor_parallel), "dtype": options.dtype}
    if not alone:
        given["kv_cache_fraction"] = SHARED
    return {**given, **dict(pair.split("=", 1) for pair in options.set)}


class Comparison:
    """Rounds of workloads on contenders, and their results."""

    def __init__(self, options: argparse.Namespace, workloads: list[Workload]) -> None:
        self._options, self._workloads = options, workloads
        self._names = [name for name in options.contenders.split(",") if name != "vllm" or print_vllm()]
        self._rounds: dict[tuple[str, str], list[dict[str, float]]] = {}
        self._memory: dict[str, float] = {}
        self._chance = random.Random(0)
        self._limit = None if "device=cpu" in options.set else ceiling(device_name())

    def run(self) -> None:
        """All contenders at a time, in turn in each round; with --in-turn each alone, all its rounds at once."""
        groups = [[name] for name in self._names] if self._options.in_turn else [self._names]
        try:
            for names in groups:
                self._together(names)
        finally:  # one that fails takes no figures of others with it
            self.table()

    def _together(self, names: list[str]) -> None:
        contenders: dict[str, Contender] = {}
        try:
            for name in names:
                contenders[name] = made(name, self._options, alone=len(names) == 1)
            for workload in self._workloads:
                self._compare(workload, contenders)
            self._about_server(contenders)
        finally:
            for contender in contenders.values():
                contender.close()

    def _compare(self, workload: Workload, contenders: dict[str, Contender]) -> None:
        for number in range(self._options.rounds + 1):  # the first warms up
            for name, contender in contenders.items():
                if name.startswith("transformers") and any(each.at for each in workload.lengths):
                    continue
                result = self._round(workload if number else _warming(workload), name, contender)
                if number:
                    self._rounds.setdefault((workload.name, name), []).append(result)
                    self._record(workload, name, result)

    def _round(self, workload: Workload, name: str, contender: Contender) -> dict[str, float]:
        requests = workload.requests(self._chance)
        traces = contender.run(requests, workload.clients)
        prompts, outputs = [len(each.ids) for each in requests], [each.output for each in requests]
        found = figures(traces, prompts, outputs, self._options.slo)
        if floor := self._floor(workload, name):
            found["of floor"] = found["tok/s"] * floor / workload.output
        return found

    def _floor(self, workload: Workload, name: str) -> float | None:
        """Seconds; None on devices without a known limit, for fewer bits, and where requests come one by one."""
        if self._limit is None or any(each.at for each in workload.lengths):
            return None
        if any(each.startswith(FEWER_BITS) for each in (*self._options.set, *name.split(":"))):
            return None
        pairs = [(each.prompt, each.output) for each in workload.lengths]
        together = workload.clients or min(len(pairs), MOST_TOGETHER)
        shape, world = Shape.of(self._options.model), self._options.tensor_parallel
        return workload_seconds(shape, pairs, together, workload.prefix, self._limit, world)

    def _about_server(self, contenders: dict[str, Contender]) -> None:
        server = contenders.get("server")
        if isinstance(server, Server):
            if self._options.witness:
                self._witnessed(server)
            with suppress(Exception):  # a process that has just ended
                self._memory = server.memory()

    def _witnessed(self, server: Server) -> None:
        """Of what comes one after the other: the witness has no such arrivals."""
        for workload in self._workloads:
            if any(each.at for each in workload.lengths):
                continue
            rounds = self._rounds[workload.name, "server"]
            result = measured(server.port, workload, statistics.median(each["req/s"] for each in rounds))
            self._record(workload, "perf_analyzer", result)
            shown = ", ".join(f"{name} {value:,.1f}" for name, value in result.items())
            print(f"perf_analyzer, {workload.name}: {shown} (times in ms)", flush=True)

    def _record(self, workload: Workload, name: str, result: dict[str, float]) -> None:
        if self._options.json:
            about = {
                "workload": workload.name, "requests": len(workload.lengths), "contender": name,
                "model": model(self._options),
                "tp": self._options.tensor_parallel, "dtype": self._options.dtype, "set": self._options.set,
                "date": time.strftime("%Y-%m-%d"), "versions": versions(),
            }  # fmt: skip
            with self._options.json.open("a") as file:
                file.write(json.dumps({**about, **{key: round(value, 3) for key, value in result.items()}}) + "\n")

    def table(self) -> None:
        options = self._options
        about = f"dtype {options.dtype}, tp {options.tensor_parallel}, medians of {options.rounds}"
        print(f"\n{model(options)}, {about}, {versions()}\n")
        columns = [*COLUMNS, *(GOODPUT if options.slo else ()), *(["of floor"] if self._limit else [])]
        heads = [column if column in (*RATES, *SHARES) else f"{column} ms" for column in columns]
        references = [name for name in self._names if name in REFERENCES or ":" in name]
        print("| " + " | ".join(["workload", "contender", *heads, *(f"of {name}" for name in references)]) + " |")
        print("|---" * (2 + len(heads) + len(references)) + "|")
        for workload, name in self._rounds:
            cells = [self._cell(workload, name, column) for column in columns]
            ratios = [self._ratio(workload, name, reference) for reference in references]
            print("| " + " | ".join([workload, name, *cells, *ratios]) + " |")
        if self._memory:
            print("\nprivate memory, MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in self._memory.items()))

    def _cell(self, workload: str, name: str, column: str) -> str:
        median = self._median(workload, name, column)
        return "" if median is None else f"{median:.{2 if column in SHARES else 1}f}"

    def _median(self, workload: str, name: str, column: str) -> float | None:
        """Of the rounds that have such a figure; None where none has."""
        found = [result[column] for result in self._rounds.get((workload, name), []) if column in result]
        return statistics.median(found) if found else None

    def _ratio(self, workload: str, name: str, reference: str) -> str:
        own, other = (self._median(workload, each, "tok/s") for each in (name, reference))
        return f"{own / other:.2f}" if own is not None and other else ""


def _warming(workload: Workload) -> Workload:
    """Enough of it to compile and to allocate most of what it will need."""
    count = len(workload.lengths)
    few = workload.of_size(max(1, min(count // 4, ENOUGH), min(count, 2 * workload.clients)))
    return replace(few, lengths=tuple(replace(each, output=min(each.output, WARM)) for each in few.lengths))


def print_vllm() -> bool:
    """VLLM is no part of this project: say so where it was asked for."""
    print("vllm: not measured here; its own server can be asked with its own bench")
    return False


def model(options: Any) -> str:
    return str(options.shape or Path(options.model).name)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "deepspeed")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
