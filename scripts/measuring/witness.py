"""perf_analyzer as a witness: Triton's own load generator against the same server, with the same kind of requests."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
MOST = 64
"""Prompts in the input file."""
SECONDS = 10
"""What it measures takes about so long: it counts in windows of a second and more."""


def inputs(workload: Workload) -> dict[str, Any]:
    """perf_analyzer's input data: token ids as they are, one step a request."""
    requests = workload.of_size(MOST).requests(random.Random(0))
    return {
        "data": [
            {
                "input_ids": {"content": request.ids, "shape": [len(request.ids)]}, "stream": [True],
                "max_tokens": [request.output], "temperature": [0.0], "ignore_eos": [True],
            }
            for request in requests
        ]
    }  # fmt: skip


def measured(port: int, workload: Workload, rate: float) -> dict[str, float]:
    """Its figures, at as many requests at a time as the workload has clients, or requests; `rate` of them a second."""
    streams = workload.clients or len(workload.lengths)
    with tempfile.TemporaryDirectory() as folder:
        data, report = Path(folder) / "inputs.json", Path(folder) / "report.csv"
        data.write_text(json.dumps(inputs(workload)))
        requests = max(len(workload.lengths), int(SECONDS * rate))
        line = [*_tool(requests, streams), "-u", f"127.0.0.1:{port}", "--input-data", str(data)]
        line += ["-f", str(report), "--concurrency-range", str(streams), "--max-threads", "32"]
        done = subprocess.run(
            line, capture_output=True, text=True, check=False, env=os.environ | {"TRITONSPEED_PYTHON": sys.executable}
        )
        if done.returncode or not report.exists():
            raise RuntimeError(f"perf_analyzer failed: {(done.stdout + done.stderr)[-2000:]}")
        return figures(report.read_text(), workload)


def _tool(requests: int, streams: int) -> list[str]:
    """perf_analyzer itself where it is installed; else scripts/perf, which fetches an older one.

    The newer one sends so many requests and is done; the older knows only windows, at whose edges it counts responses
    of requests that it does not count, so they must not be small.
    """
    if installed := shutil.which("perf_analyzer"):
        return [
            installed,
            "-i",
            "grpc",
            "-m",
            "generate",
            "--streaming",
            "--request-count",
            str(max(requests, streams)),
        ]
    windows = ["--measurement-mode", "count_windows", "--measurement-request-count", str(4 * streams)]
    return [str(ROOT / "scripts/perf"), *windows, "--stability-percentage", "999"]


def figures(text: str, workload: Workload) -> dict[str, float]:
    """From its CSV. Times there are µs; for streams, of whole requests or of first responses, by its version."""
    (row,) = csv.DictReader(text.splitlines())
    rate = float(row["Inferences/Second"])
    found = {"tok/s": rate * workload.output / len(workload.lengths), "req/s": rate}
    for name, column in (("responses/s", "Response Throughput"), ("p50", "p50 latency"), ("p99", "p99 latency")):
        if row.get(column):
            found[name] = float(row[column]) / (1 if column == "Response Throughput" else 1e3)
    return found
