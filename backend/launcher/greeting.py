"""Greeting: what the launcher says once a server is ready: where it listens, and what to type. It starts nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from backend import repository
from backend.launcher.tritonserver import Ports


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


_EXAMPLES: dict[str, tuple[str, dict[str, object]]] = {
    "embed": ('"That is a happy person"', {"text": "That is a happy person"}),
    "classify": ('"I love it"', {"text": "I love it"}),
    "qa": (
        '--question "Where does Anna live?" --context "Anna lives in Oslo."',
        {"question": "Where does Anna live?", "context": "Anna lives in Oslo."},
    ),
    "text_to_image": ('"a handwritten three"', {"prompt": "a handwritten three", "seed": 1}),
}
"""By task: what follows the program's name, and the inputs of an HTTP request."""


def local_commands(name: str, ports: Ports, task: str = "generate") -> list[str]:
    """What to type to see a model at work."""
    program = Path(sys.executable).parent / "tritonspeed"
    flag = "" if ports.grpc == 8001 else f" --port {ports.grpc}"
    if task != "generate":
        command = f"{program} {task.replace('_', '-')} --name {name}{flag}"
        return _task_commands(command, f"{ports.local}:{ports.http}", name, task)
    other = "" if ports.grpc == 8001 else f", port={ports.grpc}"
    return [
        f'{program} generate --name {name}{flag} --temperature 0 --max-tokens 16 "The capital of France is"',
        f"curl -s {ports.local}:{ports.http}/v2/models/{name}/generate "
        """-d '{"text_input": "The capital of France is", "max_tokens": 16, "temperature": 0}'""",
        f"{sys.executable} -c 'from client import pipeline; "
        f'print(pipeline("generate", name="{name}"{other})("Hello", temperature=0).text)\'',
    ]


def _task_commands(program: str, http: str, name: str, task: str) -> list[str]:
    if task not in _EXAMPLES:
        return [f"{program} --help"]
    words, inputs = _EXAMPLES[task]
    tensors = [_tensor(key, value) for key, value in inputs.items()]
    return [f"{program} {words}", f"curl -s {http}/v2/models/{name}/infer -d '{json.dumps({'inputs': tensors})}'"]


def _tensor(name: str, value: object) -> dict[str, object]:
    datatype = "UINT64" if isinstance(value, int) else "BYTES"
    return {"name": name, "datatype": datatype, "shape": [1, 1], "data": [value]}
