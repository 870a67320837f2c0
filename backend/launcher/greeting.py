"""Greeting: what the launcher says once a server is ready: where it listens, and what to type. It starts nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from backend import repository
from backend.launcher.tritonserver import Ports
from client.commands import example


def greeting(ports: Ports, models: Path, seconds: float) -> Iterator[str]:
    """Lines for people, of the repository's models."""
    names = sorted(path.name for path in models.iterdir() if (path / "config.pbtxt").is_file())
    at = f"{ports.local}:{ports.grpc} (gRPC), {ports.http} (HTTP), {ports.metrics} (metrics), {ports.health} (health)"
    yield f"ready after {seconds:.0f} s: {', '.join(names) or 'no model yet'} on {at}"
    for name in names:
        made_from = repository.origin(models, name)
        for line in local_commands(name, ports, made_from.task if made_from else "generate"):
            yield f"  {line}"
    yield f"Ctrl-C or `kill {os.getpid()}` stops it"


def local_commands(name: str, ports: Ports, task: str = "generate") -> list[str]:
    """What to type to see a model at work."""
    program = Path(sys.executable).parent / "tritonspeed"
    flag = "" if ports.grpc == 8001 else f" --port {ports.grpc}"
    if task != "generate":
        return [f"{program} {task.replace('_', '-')} --name {name}{flag} {example(task)}"]
    other = "" if ports.grpc == 8001 else f", port={ports.grpc}"
    return [
        f'{program} generate --name {name}{flag} --temperature 0 --max-tokens 16 "The capital of France is"',
        f"curl -s {ports.local}:{ports.http}/v2/models/{name}/generate "
        """-d '{"text_input": "The capital of France is", "max_tokens": 16, "temperature": 0}'""",
        f"{sys.executable} -c 'from client import pipeline; "
        f'print(pipeline("generate", name="{name}"{other})("Hello", temperature=0).text)\'',
    ]
