"""The server's packages, where they are: the checks before a deployment. It knows neither servers nor repositories.

Nothing of them is imported before it is used: who only asks a server has none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from client.errors import InvalidInput

Tell = Callable[[str], object]


def check(model: str, task: str, name: str, given: Mapping[str, Any], tell: Tell) -> dict[str, str]:
    """The parameters as text, once model and devices are known to fit them."""
    with server_packages():
        from backend import checkpoint, devices, fit, repository, samples, tasks
        from backend.config import EngineConfig

        parameters = {key: _text(value) for key, value in given.items() if value is not None}
        repository.check_name(name)
        EngineConfig.from_parameters({"model": model, **parameters})  # before a download
        parameters = {"model": samples.locate(model, task), **parameters}
        config = EngineConfig.from_parameters(parameters)
        if task != "generate":
            tasks.find(task)(checkpoint.resolve(config.model, checkpoint.root()), devices.resolved(config))
        for line in fit.check(config, task).report():
            tell(f"{name}: {line}")
    return parameters


@contextmanager
def server_packages() -> Iterator[None]:
    """Errors of the backend as ours."""
    try:
        from backend.errors import ServingError
    except ImportError as error:
        raise _missing(error) from None
    try:
        yield
    except ServingError as error:
        raise InvalidInput(" ".join(str(error).split())) from None
    except ImportError as error:
        raise _missing(error) from None


def _missing(error: ImportError) -> InvalidInput:
    return InvalidInput(f"deploying needs the server's packages ({error}): pip install 'tritonspeed[server]'")


def _text(value: str | int | float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
