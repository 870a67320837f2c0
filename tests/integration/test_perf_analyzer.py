"""perf_analyzer, as `scripts/perf` runs it: both input files at concurrency 1, 4 and 16, without a failed request."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "perf").glob("generate*.json"))
QUICK = ["--measurement-mode", "count_windows", "--stability-percentage", "999"]


def perf(served, *options, timeout=200):
    where = ["-u", f"127.0.0.1:{served.port}", "-m", "smollm2", *QUICK]
    environment = os.environ | {"TRITONSPEED_PYTHON": sys.executable}
    line = [ROOT / "scripts" / "perf", *where, *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, env=environment)


def test_there_are_files_for_both_ways():
    data = [json.loads((ROOT / "perf" / name).read_text())["data"] for name in FILES]
    assert sorted({request["stream"][0] for request in each} == {True} for each in data) == [False, True]
    assert all(len(each) > 3 and all(request["max_tokens"][0] > 8 for request in each) for each in data)


@pytest.mark.parametrize("concurrency", [1, 4, 16])
@pytest.mark.parametrize("name", FILES)
def test_perf_analyzer(served, tmp_path, name, concurrency):
    data, report = ROOT / "perf" / name, tmp_path / "report.csv"
    load = ["--concurrency-range", str(concurrency), "--measurement-request-count", str(max(2, concurrency))]
    done = perf(served, "--input-data", data, "-f", report, *load)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in (done.stdout + done.stderr).lower()
    (row,) = csv.DictReader(report.read_text().splitlines())
    assert int(row["Concurrency"]) == concurrency and float(row["Inferences/Second"]) > 0
    responses = float(row["Response Throughput"]) / float(row["Inferences/Second"])
    assert responses == 1 if "whole" in name else responses > 3  # to one request


def test_a_failed_request_fails_the_run(served, tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"data": [{"text_input": ["a"], "stream": [True], "temperature": [-1.0]}]}))
    done = perf(served, "--input-data", bad)
    assert done.returncode != 0 and "InvalidInput: temperature" in done.stdout + done.stderr
