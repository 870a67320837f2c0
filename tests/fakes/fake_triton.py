"""FakeTriton: Triton's gRPC service in this process, with scripted answers. It does not generate anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient import utils
from tritonclient.grpc import service_pb2, service_pb2_grpc

Rows = dict[str, Any]
"""Values by name: a list becomes [rows, 1], an array is sent as it is."""
Script = Callable[["Received"], Iterator[Rows | str]]

TYPES = {
    "index": np.int32,
    "num_input_tokens": np.uint32,
    "num_output_tokens": np.uint32,
    "cumulative_logprob": np.float32,
}


class Failure(Exception):
    """What a script raises to end its call with a gRPC status."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = getattr(grpc.StatusCode, code)


@dataclass
class Received:
    """One request, decoded."""

    model: str
    inputs: dict[str, np.ndarray]
    datatypes: dict[str, str]
    parameters: dict[str, Any]
    metadata: dict[str, str]
    context: grpc.ServicerContext
    streamed: bool = True
    """Whether it came by ModelStreamInfer."""
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when the client cancelled or left."""

    @property
    def prompt(self) -> str:
        return self.inputs["text_input"].item().decode()

    @property
    def stream(self) -> bool:
        return bool("stream" in self.inputs and self.inputs["stream"].item())


def row(text: str, finish_reason: str = "", index: int = 0, inputs: int = 3, outputs: int = 1) -> Rows:
    """A response of one row."""
    return {
        "text_output": [text],
        "index": [index],
        "finish_reason": [finish_reason],
        "num_input_tokens": [inputs],
        "num_output_tokens": [outputs],
    }


def echo(received: Received) -> Iterator[Rows]:
    """The prompt in capitals: word by word when streaming, else n times."""
    words = received.prompt.upper().split(" ")
    if received.stream:
        for i, word in enumerate(words):
            last = i + 1 == len(words)
            yield row(word if last else word + " ", "stop" if last else "")
    else:
        n = int(received.inputs["n"].item()) if "n" in received.inputs else 1
        parts = [row(" ".join(words), "stop", i, outputs=len(words)) for i in range(n)]
        yield {name: [part[name][0] for part in parts] for name in parts[0]}


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A server on a free port of the loopback; `script` answers each inference."""

    def __init__(
        self, script: Script = echo, port: int = 0, repository: Path | None = None, credentials: Any = None
    ) -> None:
        self.script, self.repository = script, repository
        self.requests: list[Received] = []
        self.calls: list[tuple[str, str]] = []
        self.ready: dict[str, tuple[str, str]] = {}
        self.explicit = True
        self.load_failure = ""
        self.state_after_load, self.state_after_unload = "READY", "UNAVAILABLE"
        self._server = grpc.server(ThreadPoolExecutor(64), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        bound = f"127.0.0.1:{port}"
        add = self._server.add_secure_port if credentials else self._server.add_insecure_port
        self.port = add(bound, credentials) if credentials else add(bound)
        self._server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.stop(0).wait(5)

    def ModelInfer(self, request, context):
        received = decode(request, context)
        received.streamed = False
        self.requests.append(received)
        context.add_callback(received.gone.set)
        try:
            rows = next(iter(self.script(received)))
        except Failure as failure:
            context.abort(failure.code, str(failure))
        if isinstance(rows, str):
            context.abort(grpc.StatusCode.INTERNAL, rows)
        return encode(rows)

    def ModelStreamInfer(self, request_iterator, context):
        received = decode(next(request_iterator), context)
        self.requests.append(received)
        context.add_callback(received.gone.set)
        try:
            for rows in self.script(received):
                if isinstance(rows, str):  # as Triton tells of a failed request
                    yield service_pb2.ModelStreamInferResponse(error_message=rows)
                else:
                    yield service_pb2.ModelStreamInferResponse(infer_response=encode(rows))
        except Failure as failure:
            context.abort(failure.code, str(failure))

    def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=self.ready.get(request.name, ("", ""))[0] == "READY")

    def RepositoryIndex(self, request, context):
        self.calls.append(("index", ""))
        models = [
            {"name": name, "version": "1", "state": state, "reason": reason}
            for name, (state, reason) in self.ready.items()
        ]
        return service_pb2.RepositoryIndexResponse(models=models)

    def RepositoryModelLoad(self, request, context):
        name = request.model_name
        self.calls.append(("load", name))
        self._check_explicit(context)
        if self.repository is not None and not (self.repository / name / "config.pbtxt").exists():
            context.abort(grpc.StatusCode.INTERNAL, f"failed to load '{name}', failed to poll from model repository")
        if self.load_failure:
            context.abort(grpc.StatusCode.INTERNAL, f"failed to load '{name}', {self.load_failure}")
        self.ready[name] = (self.state_after_load, "")
        return service_pb2.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request, context):
        self.calls.append(("unload", request.model_name))
        self._check_explicit(context)
        if request.model_name in self.ready:
            self.ready[request.model_name] = (self.state_after_unload, "unloaded")
        return service_pb2.RepositoryModelUnloadResponse()

    def _check_explicit(self, context):
        if not self.explicit:
            message = "explicit model load / unload is not allowed if polling is enabled"
            context.abort(grpc.StatusCode.UNAVAILABLE, message)


@contextmanager
def serving(script: Script = echo, **options: Any) -> Iterator[FakeTriton]:
    server = FakeTriton(script, **options)
    try:
        yield server
    finally:
        server.stop()


def until(holds: Callable[[], object], seconds: float = 10.0) -> bool:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(holds())


def decode(request: Any, context: grpc.ServicerContext) -> Received:
    inputs = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        flat = (
            utils.deserialize_bytes_tensor(raw)
            if tensor.datatype == "BYTES"
            else np.frombuffer(raw, utils.triton_to_np_dtype(tensor.datatype))
        )
        inputs[tensor.name] = flat.reshape(tuple(tensor.shape))
    datatypes = {tensor.name: tensor.datatype for tensor in request.inputs}
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.parameters.items()
    }
    return Received(request.model_name, inputs, datatypes, parameters, dict(context.invocation_metadata()), context)


def encode(rows: Rows) -> Any:
    response = service_pb2.ModelInferResponse()
    for name, values in rows.items():
        array = values if isinstance(values, np.ndarray) else _column(name, values)
        if array.dtype == np.object_:
            raw = utils.serialize_byte_tensor(array).item() if array.size else b""
        else:
            raw = array.tobytes()
        datatype = utils.np_to_triton_dtype(array.dtype)
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(raw)
    return response


def _column(name: str, values: list[Any]) -> np.ndarray:
    if name in TYPES:
        return np.array(values, TYPES[name]).reshape(-1, 1)
    return np.array([value.encode() for value in values], np.object_).reshape(-1, 1)
