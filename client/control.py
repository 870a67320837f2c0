"""Control: Triton's health and model-repository calls. It does not know what the models do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client.channel import Endpoint, connect
from client.errors import DeadlineExceeded, Error, InvalidInput, ServerError, Unavailable, failure

CALL_SECONDS = 10.0
"""For a call that has nothing to wait for."""

HOW_TO_START = "start it with `./scripts/serve --explicit`"

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Model:
    """One model of a server's repository."""

    name: str
    version: str
    state: str
    """READY, LOADING, UNLOADING or UNAVAILABLE; empty: never loaded."""
    reason: str
    """Why it is not ready."""


class Control:
    """The first address of an endpoint. Every method raises `client.Error`; time limits are seconds."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.address, self._metadata = endpoint.addresses[0], endpoint.metadata
        self._channel = connect(endpoint, self.address)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.close()

    def live(self, timeout: float = CALL_SECONDS) -> bool:
        """Whether a server answers."""
        try:
            return bool(self._call("ServerLive", service_pb2.ServerLiveRequest(), timeout).live)
        except Unavailable:
            return False

    def ready(self, name: str) -> bool:
        """Whether a model takes requests."""
        return bool(self._call("ModelReady", service_pb2.ModelReadyRequest(name=name)).ready)

    def models(self) -> list[Model]:
        """The repository: every model, loaded or not."""
        index = self._call("RepositoryIndex", service_pb2.RepositoryIndexRequest()).models
        return [Model(found.name, found.version, found.state, reason(found.reason)) for found in index]

    def load(self, name: str, timeout: float) -> None:
        """Load a model, or load it again; returns when it is loaded."""
        request = service_pb2.RepositoryModelLoadRequest(model_name=name)
        self._call("RepositoryModelLoad", request, timeout, f"{name!r} could not be loaded")

    def unload(self, name: str, timeout: float) -> None:
        """Unload a model; requests that it is working on are finished first, after this returns."""
        request = service_pb2.RepositoryModelUnloadRequest(model_name=name)
        self._call("RepositoryModelUnload", request, timeout, f"{name!r} could not be unloaded")

    def wait_live(self, timeout: float) -> None:
        """Until a server answers."""
        _wait(self.live, timeout, f"no server answered at {self.address}")

    def wait_ready(self, name: str, timeout: float) -> None:
        """Until a model takes requests."""
        _wait(lambda: self.ready(name), timeout, f"{name!r} was not ready")

    def wait_gone(self, name: str, timeout: float) -> None:
        """Until a model is unloaded to the last request."""
        _wait(lambda: not self._loaded(name), timeout, f"{name!r} was not unloaded")

    def _loaded(self, name: str) -> bool:
        return any(model.name == name and model.state in ("READY", "LOADING", "UNLOADING") for model in self.models())

    def _call(self, method: str, request: Any, timeout: float = CALL_SECONDS, otherwise: str = "") -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            code, text = error.code().name, error.details() or ""
            if code == "DEADLINE_EXCEEDED":
                raise DeadlineExceeded(f"{self.address} did not answer within {timeout:.3g} s", code) from None
            refused = refusal(otherwise, code, text, self.address) if otherwise else None
            raise refused or failure(code, text, self.address) from None


def refusal(what: str, code: str, text: str, address: str) -> Error | None:
    """What Triton's repository will not do, and why; None where it is something else that failed."""
    if "explicit model load" in text:
        return InvalidInput(f"the server at {address} takes no deployments; {HOW_TO_START}", code)
    if "failed to poll" in text:
        return InvalidInput(f"{what}: the server at {address} does not find it in the folder that it serves", code)
    if not _LOAD_FAILED.search(text):
        return None
    named = "LoadError: " in text  # the backend's: this model cannot be served so
    return (InvalidInput if named else ServerError)(f"{what}: {reason(text)}", code)


def reason(text: str) -> str:
    """Why a load failed, in one line: Triton's account without its frame and without the Python stack."""
    line = " ".join(_LOAD_FAILED.sub("", text).split())
    return _FRAME.sub("", line.partition(" At: ")[0]).strip(" ;")


_LOAD_FAILED = re.compile(
    r"(?:load failed for model|failed to load) '[^']*'[:,] (?:version \d+ is at UNAVAILABLE state: )?"
)
_FRAME = re.compile(r"^(?:Internal|Unavailable|Invalid argument): (?:TritonModelException: )?(?:LoadError: )?")


def _wait(holds: Callable[[], bool], timeout: float, otherwise: str) -> None:
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            raise DeadlineExceeded(f"{otherwise} within {timeout:g} s; raise timeout=")
        time.sleep(_POLL_SECONDS)
