"""Files in /dev/shm that dead servers left behind. It never touches one that a living process has mapped.

Triton's stubs and DeepSpeed's CPU all-reduce both keep theirs when they are killed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from backend.launcher.tritonserver import SHARED_MEMORY_PREFIX

FOLDER = Path("/dev/shm")  # noqa: S108
_OURS = re.compile(rf"{SHARED_MEMORY_PREFIX}(\d+)_")
_SHARED_NAMES = ("deepspeed_allreduce_buffer_", "triton_python_backend_shm_region_")
"""Prefixes that others use too, so a file must also be old enough not to be in the making."""
_HOLDERS = re.compile(rb"triton|deepspeed|backend\.ranks")
_MAKING = 10.0
"""Seconds between a file's creation and its first mapping, at the very most."""


def sweep(folder: Path = FOLDER) -> list[str]:
    """Removes what nobody uses; returns the names."""
    found = [path for path in folder.iterdir() if _abandoned(path)] if folder.is_dir() else []
    if not found:
        return []
    try:
        mapped = _mapped(folder)
    except PermissionError:  # in a user namespace, say: who has them cannot be told, only whose launcher is gone
        found, mapped = [path for path in found if _OURS.match(path.name)], set()
    unused = [path for path in found if str(path) not in mapped]
    for path in unused:
        path.unlink(missing_ok=True)
    return [path.name for path in unused]


def remove(pid: int, folder: Path = FOLDER) -> None:
    """Removes the files of the launcher `pid` once all that it started is gone."""
    for path in folder.glob(f"{SHARED_MEMORY_PREFIX}{pid}_*"):
        path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if status.st_uid != os.getuid():
        return False
    if match := _OURS.match(path.name):
        return not Path(f"/proc/{match[1]}").exists()
    return path.name.startswith(_SHARED_NAMES) and time.time() - status.st_mtime > _MAKING


def _mapped(folder: Path) -> set[str]:
    """Paths under `folder` that any process has mapped or open; PermissionError if we may not look at a likely one."""
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            used.update(_held(folder, process))
        except PermissionError:
            if _likely(process):
                raise
        except OSError:  # it has ended
            continue
    return used


def _likely(process: Path) -> bool:
    """Whether a process is, by its command line, one that has such files."""
    try:
        return bool(_HOLDERS.search((process / "cmdline").read_bytes()))
    except OSError:
        return False


def _held(folder: Path, process: Path) -> Iterable[str]:
    yield from _paths(folder, (process / "maps").read_text(errors="replace").splitlines())
    for handle in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(handle)


def _paths(folder: Path, lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        at = line.find(f"{folder}/")
        if at >= 0:
            yield line[at:].removesuffix(" (deleted)")
