"""Model directories of Triton, written from the templates in model_repository/. It does not know any server.

A directory that was written here holds a file that says so; no other directory is ever replaced or removed unasked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc.model_config_pb2 import ModelConfig

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError

MARK = ".tritonspeed.json"
"""In a directory that was written here: its Origin."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LONGEST_NAME = 128
_MOST_ROWS = 2**31 - 1


@dataclass(frozen=True)
class Origin:
    """What a model directory was written from."""

    task: str
    parameters: dict[str, str]


def tasks() -> list[str]:
    """Names of the tasks that there are templates for."""
    return sorted(folder.name for folder in _templates().iterdir() if (folder / "config.pbtxt").is_file())


def write(repository: Path, task: str, name: str, parameters: Mapping[str, str], replace: bool = False) -> Path:
    """The directory `repository`/`name`, there at once or not at all; one that was written here before is replaced.

    InvalidInput for a bad name or task, or for a directory of someone else's unless `replace`; LoadError for a
    parameter that EngineConfig does not take.
    """
    target = _target(repository, name)
    config = _config(task, name, parameters)
    if target.exists() and not replace and origin(repository, name) is None:
        raise InvalidInput(f"{target} was not written by tritonspeed; ask to replace it, or choose another name")
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=repository) as scratch:
        fresh = Path(scratch) / "new"
        _fill(fresh, task, config, Origin(task, dict(parameters)))
        _exchange(fresh, target, Path(scratch) / "old")
    return target


def remove(repository: Path, name: str) -> None:
    """Remove a directory that was written here; InvalidInput for any other one."""
    target = _target(repository, name)
    if origin(repository, name) is None:
        raise InvalidInput(f"{target} was not written by tritonspeed, so it stays")
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=repository) as scratch:
        os.rename(target, Path(scratch) / "old")


def origin(repository: Path, name: str) -> Origin | None:
    """What a directory was written from; None where it is not there or not ours."""
    try:
        return Origin(**json.loads((_target(repository, name) / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def check_name(name: str) -> None:
    """InvalidInput unless a model may be called so."""
    if not _NAME.fullmatch(name) or name.startswith(".") or len(name) > _LONGEST_NAME:
        rule = f"1 to {_LONGEST_NAME} letters, digits, '_', '-' or '.', and not begin with '.'"
        raise InvalidInput(f"a model's name must be {rule}; not {name!r:.200}")


def _target(repository: Path, name: str) -> Path:
    check_name(name)
    target = repository / name
    if target.is_symlink():
        raise InvalidInput(f"{target} is a link; model directories are written in the repository itself")
    return target


def _config(task: str, name: str, parameters: Mapping[str, str]) -> ModelConfig:
    if task not in tasks():
        raise InvalidInput(f"there is no task {task!r}; available: {', '.join(tasks())}")
    path = _templates() / task / "config.pbtxt"
    config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    config.name = name
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    found = EngineConfig.from_parameters({key: value.string_value for key, value in config.parameters.items()})
    if task == "generate":  # Triton refuses requests of more rows before the model sees them
        config.max_batch_size = min(max(config.max_batch_size, found.max_prompts), _MOST_ROWS)
    return config


def _fill(folder: Path, task: str, config: ModelConfig, made_from: Origin) -> None:
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(_templates() / task / "1" / "model.py", folder / "1" / "model.py")
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    (folder / MARK).write_text(json.dumps(asdict(made_from)), encoding="utf-8")


def _exchange(fresh: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def _templates() -> Path:
    """Inside an installed package, else beside it in the clone."""
    here = Path(__file__).resolve().parent
    for folder in (here / "model_repository", here.parent / "model_repository"):
        if folder.is_dir():
            return folder
    raise LoadError("this installation has no model_repository/: install it again")
