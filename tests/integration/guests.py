"""Guests: models that come into the running server for one test file, and measures of what a process holds."""

import re
import shutil
import urllib.request
from contextlib import contextmanager

import psutil
from waiting import eventually

from backend import repository


def unloaded(control, name):
    """To its last process."""
    control.wait_gone(name, 60)


@contextmanager
def guest(served, task, name, folder, leave=unloaded, **parameters):
    """A model that is loaded, and afterwards unloaded, which `leave` waits for."""
    given = {"model": str(folder), **{key: str(value) for key, value in parameters.items()}}
    repository.write(served.repository, task, name, given)
    try:
        with served.control() as control:
            control.load(name, 180)
            try:
                yield name
            finally:
                control.unload(name, 60)
                leave(control, name)
    finally:
        shutil.rmtree(served.repository / name)


def tritonserver(served):
    (found,) = [process for process in served.processes() if process.name() == "tritonserver"]
    return found


def memory(*processes):
    """MiB that are the processes' own."""
    return sum(psutil.Process(process.pid).memory_full_info().uss for process in processes) >> 20


def metrics(served):
    """Values by name and labels, as Prometheus would read them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def counter(served, name, model):
    return next((v for key, v in metrics(served).items() if re.match(rf'{name}{{.*model="{model}"', key)), 0.0)


def queued(served, count, model="single"):
    """Waits until so many sequences wait to run."""
    eventually(lambda: counter(served, "vllm:num_requests_waiting", model) == count)
