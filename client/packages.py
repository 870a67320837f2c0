"""The server's packages, where they are: the checks before a deployment. It knows neither servers nor repositories.

Nothing of them is imported before it is used: who only asks a server has none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.errors import InvalidInput

Tell = Callable[[str], object]


def check(model: str, task: str, name: str, given: Mapping[str, Any], tell: Tell) -> dict[str, str]:
    """The parameters as text, once model and devices are known to fit them."""
    with server_packages(model):
        from backend import devices, fit, model_folder, repository, samples, tasks
        from backend.config import EngineConfig

        parameters = {key: _text(value) for key, value in given.items() if value is not None}
        repository.check_name(name)
        EngineConfig.from_parameters({"model": model, **parameters})  # before a download
        parameters = {"model": samples.locate(model, task), **parameters}
        config = EngineConfig.from_parameters(parameters)
        if task != "generate":
            tasks.find(task)(model_folder.resolve(config.model, model_folder.root()), devices.resolved(config))
        report = fit.check(config, task).report()
    for line in report:
        tell(f"{name}: {line}")
    return parameters


@contextmanager
def server_packages(at: str | Path) -> Iterator[None]:
    """Errors of the backend as ours; those of files name their path, or `at` where they know none."""
    try:
        from backend.errors import ServingError
    except ImportError as error:
        raise missing("deploying", error) from None
    try:
        yield
    except ServingError as error:
        raise InvalidInput(" ".join(str(error).split())) from None
    except ImportError as error:
        raise missing("deploying", error) from None
    except OSError as error:
        raise InvalidInput(f"{error.filename or at}: {error.strerror or error}") from None


def missing(what: str, error: ImportError) -> InvalidInput:
    """The error where `what` needs packages that are not here."""
    return InvalidInput(f"{what} needs the server's packages ({error}): pip install '.[server]' in tritonspeed's clone")


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
