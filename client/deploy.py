"""Deploying: check a model, write its directory, have a server load it. It does not know what the model is asked.

The checks and the directory need the server's packages, which are imported when they are used: they must be where the
server's repository is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from client import local
from client.channel import Endpoint, Tls, is_local
from client.classify import Classify
from client.control import HOW_TO_START, Control, Model
from client.embed import Embed
from client.errors import DeadlineExceeded, Error, InvalidInput, ServerError, Unavailable
from client.fill_mask import FillMask
from client.generate import Generate
from client.packages import Tell, check, server_packages
from client.pipeline import Pipeline
from client.qa import QuestionAnswering
from client.rerank import Rerank
from client.tasks import TASKS, pipeline
from client.text_to_image import TextToImage
from client.token_classification import TokenClassification
from client.zero_shot_image import ZeroShotImage

if TYPE_CHECKING:
    from backend.repository import Origin

Folder = str | Path


@dataclass(frozen=True)
class Place:
    """A server and the repository that it serves."""

    endpoint: Endpoint
    host: str
    port: int
    repository: Path | None

    @property
    def address(self) -> str:
        return self.endpoint.addresses[0]

    def folder(self) -> Path:
        """The repository's folder: as given, or as the launcher of the server announced it."""
        server = local.find(self.port) if is_local(self.host) else None
        if server and not server.explicit:
            raise InvalidInput(f"the server at {self.address} takes no deployments; {HOW_TO_START}")
        if self.repository is not None:
            return self.repository.expanduser().absolute()
        if server is None:
            raise InvalidInput(f"which folder does the server at {self.address} serve? name it with repository=")
        return Path(server.repository)


@overload
def deploy(
    model: Folder, task: Literal["generate"] = "generate", name: str | None = None, **options: Any
) -> Generate: ...
@overload
def deploy(model: Folder, task: Literal["embed"], name: str | None = None, **options: Any) -> Embed: ...
@overload
def deploy(model: Folder, task: Literal["classify"], name: str | None = None, **options: Any) -> Classify: ...
@overload
def deploy(model: Folder, task: Literal["qa"], name: str | None = None, **options: Any) -> QuestionAnswering: ...
@overload
def deploy(model: Folder, task: Literal["rerank"], name: str | None = None, **options: Any) -> Rerank: ...
@overload
def deploy(
    model: Folder, task: Literal["token_classification"], name: str | None = None, **options: Any
) -> TokenClassification: ...
@overload
def deploy(model: Folder, task: Literal["fill_mask"], name: str | None = None, **options: Any) -> FillMask: ...
@overload
def deploy(
    model: Folder, task: Literal["zero_shot_image"], name: str | None = None, **options: Any
) -> ZeroShotImage: ...
@overload
def deploy(model: Folder, task: Literal["text_to_image"], name: str | None = None, **options: Any) -> TextToImage: ...
def deploy(
    model: Folder,
    task: str = "generate",
    name: str | None = None,
    *,
    tensor_parallel: int = 1,
    dtype: str | None = None,
    max_model_len: int | None = None,
    kv_cache_fraction: float | None = None,
    repository: str | Path | None = None,
    host: str = "localhost",
    port: int = 8001,
    tls: bool | Tls = False,
    headers: Mapping[str, str] | None = None,
    timeout: float = 1800.0,
    replace: bool = False,
    tell: Tell = lambda line: None,
    **parameters: str | int | float | bool,
) -> Pipeline:
    """Serve a model (a Hugging Face folder or hub id) as `name` (default: the task's) and return its pipeline, warm.

    Model, devices and parameters (the fields of backend.config.EngineConfig) are checked before anything is written.
    Where no server answers at a port of this machine, one is started, which lives on. `repository` is the folder that
    the server serves, found by itself for a server of this machine's own launcher. A directory that was not written by
    deploy is only replaced with `replace`. When the load fails, the directory goes again, and what was there before
    comes back. `tell` takes lines of progress; `timeout` is in seconds. Raises `client.Error`.
    """
    if task not in TASKS:
        raise InvalidInput(f"there is no task {task!r}; available: {', '.join(TASKS)}")
    end = time.monotonic() + timeout
    name = name or task
    place = Place(Endpoint.of(host, port, (), tls, headers), host, port, Path(repository) if repository else None)
    given = {
        "tensor_parallel": tensor_parallel,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "kv_cache_fraction": kv_cache_fraction,
        **parameters,
    }
    checked = check(str(model), task, name, given, tell)
    with Control(place.endpoint) as control:
        if not control.live():
            place = _start(place, end, tell)
            control.wait_live(_left(end))
        tell(f"{name}: loading at {place.address}")
        with _written(place.folder(), task, name, checked, replace):
            _load(control, name, end)
    made: Pipeline = pipeline(cast(Any, task), name, host, port, tls=tls, headers=headers)
    return made


def undeploy(
    name: str,
    *,
    repository: str | Path | None = None,
    host: str = "localhost",
    port: int = 8001,
    tls: bool | Tls = False,
    headers: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> None:
    """Unload a model once its requests are done, and remove its directory if deploy wrote it."""
    end = time.monotonic() + timeout
    place = Place(Endpoint.of(host, port, (), tls, headers), host, port, Path(repository) if repository else None)
    with Control(place.endpoint) as control:
        known = sorted({model.name for model in control.models()})
        if name not in known:
            raise InvalidInput(
                f"there is no model {name!r} at {place.address}; there are: {', '.join(known) or 'none'}"
            )
        control.unload(name, _left(end))
        control.wait_gone(name, _left(end))
    _remove(place, name)


def models(
    *,
    host: str = "localhost",
    port: int = 8001,
    tls: bool | Tls = False,
    headers: Mapping[str, str] | None = None,
) -> list[Model]:
    """The models of a server's repository, loaded or not, with the reason where one is not."""
    with Control(Endpoint.of(host, port, (), tls, headers)) as control:
        return sorted(control.models(), key=lambda model: (model.name, model.version))


def _start(place: Place, end: float, tell: Tell) -> Place:
    """Start a server of this machine that outlives this process."""
    if not is_local(place.host):
        raise Unavailable(f"no server answers at {place.address}; {HOW_TO_START} there")
    from backend.launcher.run_folder import run

    folder = (place.repository or run() / f"models-{place.port}").expanduser().absolute()
    with server_packages(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tell(f"no server answers at {place.address}: starting one on {folder}")
    others = [] if place.port == 8001 else ["--http-port", "0", "--metrics-port", "0"]
    where = ["--port", str(place.port), *others, "--repository", str(folder)]
    command = [sys.executable, "-P", "-m", "backend.server", "--explicit", "--keep-going", "--detach", *where]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_left(end), stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"no server was ready at {place.address} in time; raise timeout=") from None
    if done.returncode:
        raise ServerError(f"the server did not start: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return Place(place.endpoint, place.host, place.port, folder)


@contextmanager
def _written(folder: Path, task: str, name: str, parameters: dict[str, str], replace: bool) -> Iterator[None]:
    """The model's directory; if writing it or the body fails, what was there before."""
    from backend import repository

    with server_packages(folder):
        before = repository.origin(folder, name)
        kept = _place_aside(folder, name) if replace and before is None else None
    try:
        with server_packages(folder):
            if kept:
                (folder / name).rename(kept)
            repository.write(folder, task, name, parameters, replace)
        yield
    except BaseException:
        with server_packages(folder):
            _restore(folder, name, before, kept)
        raise
    if kept:
        shutil.rmtree(kept, ignore_errors=True)


def _place_aside(folder: Path, name: str) -> Path | None:
    """Where somebody else's directory waits until its replacement is loaded; None where there is none."""
    kept = folder / f".{name}.before"
    if not (folder / name).exists():
        return None
    if kept.exists():
        raise InvalidInput(f"{kept} holds what a replacement that was cut off put aside; move it away first")
    return kept


def _restore(folder: Path, name: str, before: Origin | None, kept: Path | None) -> None:
    from backend import repository

    if repository.origin(folder, name) != before:
        if before is None:
            repository.remove(folder, name)
        else:
            repository.write(folder, before.task, name, before.parameters)
    if kept and not (folder / name).exists():
        kept.rename(folder / name)


def _load(control: Control, name: str, end: float) -> None:
    try:
        control.load(name, _left(end))
        control.wait_ready(name, _left(end))
    except (DeadlineExceeded, KeyboardInterrupt):
        with suppress(Error):  # it may still be loading what nobody waits for
            control.unload(name, timeout=10)
        raise


def _remove(place: Place, name: str) -> None:
    try:
        from backend import repository
    except ImportError:
        return  # whoever deployed it had the packages; a client elsewhere only unloads
    if place.repository is None and not (is_local(place.host) and local.find(place.port)):
        return
    folder = place.folder()
    with server_packages(folder):
        if repository.origin(folder, name) is not None:
            repository.remove(folder, name)


def _left(end: float) -> float:
    return max(0.1, end - time.monotonic())
