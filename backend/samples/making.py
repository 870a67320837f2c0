"""Makes a sample's folder, whole or not at all. It does not know when one is wanted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from backend.errors import LoadError
from backend.samples.archive import download, unpack, unpack_folder
from backend.samples.table import Sample

STAMP = ".complete"
"""A folder without it, or with another sample's, is made anew."""


def is_made(sample: Sample, folder: Path) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text().strip() == sample.mark


def make(sample: Sample, base: Path | None, folder: Path, line: int = 0) -> None:
    """Builds it beside the folder and moves it there once done. Its progress is drawn on that line of the terminal.

    To be called by one at a time: what a killed one has left is removed.
    """
    scratch = folder.with_name(f".{folder.name}.part")
    built = scratch / "built"
    shutil.rmtree(scratch, ignore_errors=True)
    built.mkdir(parents=True)
    try:
        _build(sample, base, scratch, built, line)
        (built / STAMP).write_text(f"{sample.mark}\n")
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _say(sample, f"ready in {folder}")


def _build(sample: Sample, base: Path | None, scratch: Path, built: Path, line: int) -> None:
    sources = [] if base is None else [base]
    if sample.archive is not None:
        _say(sample, f"fetching {sample.archive.package}")
        sources.insert(0, _fetched(sample, download(sample.archive, scratch), scratch, built))
    if sample.program:
        _say(sample, f"made by {sample.program}, about {sample.minutes:g} min")
        run(sample, [*sources, built], line)


def _fetched(sample: Sample, file: Path, scratch: Path, built: Path) -> Path:
    if not sample.member:
        return file
    if sample.member.endswith("/"):
        unpack_folder(file, sample.member, built)
        return built
    return unpack(file, sample.member, scratch)


def run(sample: Sample, arguments: list[Path], line: int = 0) -> None:
    """In a process of its own: torch and 1 GB of memory are gone with it."""
    command = [sys.executable, "-P", "-m", sample.program, *map(str, arguments)]
    stderr = None if sys.stderr.isatty() else subprocess.PIPE  # a bar is drawn on a terminal alone
    done = subprocess.run(command, check=False, env=_environment(line), stdout=subprocess.DEVNULL, stderr=stderr)
    if done.returncode:
        said = (done.stderr or b"").decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"ended with status {done.returncode}"
        raise LoadError(f"{sample.name} could not be made: {sample.program}: {reason}")


def _environment(line: int) -> dict[str, str]:
    """One thread, no hub, no chatter; two programs at once draw their bars on two lines."""
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    return {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_POSITION": str(line)}


def _say(sample: Sample, text: str) -> None:
    print(f"{sample.name} | {text}", file=sys.stderr, flush=True)
