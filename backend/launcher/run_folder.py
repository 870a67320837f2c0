"""The folder of one running server: its repository, its backends, its neutral working directory. It starts nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def home() -> Path:
    """The clone that this package lies in, or for an installed one a folder of the user's."""
    clone = Path(__file__).resolve().parent.parent.parent
    return clone if (clone / "pyproject.toml").is_file() else Path.home() / ".cache" / "tritonspeed"


def run() -> Path:
    """Where running servers keep their files: $TRITONSPEED_RUN, else .run in the clone."""
    return Path(os.environ.get("TRITONSPEED_RUN") or home() / ".run").absolute()


def cache() -> Path:
    """Where fetched models and built ops stay: $TRITONSPEED_CACHE, else .cache in the clone."""
    return Path(os.environ.get("TRITONSPEED_CACHE") or home() / ".cache").absolute()


@contextmanager
def run_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder of this process's own, gone afterwards; those of killed launchers go first."""
    parent = parent or run()
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob("server-*"):
        if not Path(f"/proc/{stale.name.removeprefix('server-')}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    folder = parent / f"server-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
