"""Served: one launcher with its tritonserver, started, asked over raw gRPC and HTTP, ended, and what it left behind."""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import psutil
from tritonclient.grpc import service_pb2_grpc
from waiting import eventually as eventually

from client import async_pipeline, pipeline
from client.channel import Endpoint
from client.control import Control
from client.tensors import decode, encode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fakes"))
import shared_memory

TYPES = {"max_tokens": "i4", "min_tokens": "i4", "n": "i4", "top_k": "i4", "input_ids": "i4", "stop_token_ids": "i4",
         "temperature": "f4", "top_p": "f4", "min_p": "f4", "repetition_penalty": "f4", "frequency_penalty": "f4",
         "presence_penalty": "f4", "seed": "u8", "random_seed": "u8", "min_length": "i4"}  # fmt: skip
LAUNCHER = ("-m", "backend.server")
DRAIN, LIMIT = 5, 40
"""Seconds: what requests get at the end, and the outer limit, since 2.51 can hang with an open stream."""


@contextmanager
def running(folder, repository, *arguments, program=LAUNCHER):
    """A server that is ready; at the end it must stop in order and leave nothing."""
    server = Served(folder, repository, *arguments, program=program)
    try:
        yield server.wait()
    finally:
        early, status = server.process.poll(), server.stop()
    assert (early, status) == (None, 0), server.said
    assert server.left() == []


class Served:
    """A launcher in a process of its own; everything that descends from it carries `mark` in its environment."""

    def __init__(self, folder, repository, *arguments, run=None, program=LAUNCHER):
        self.mark, self.folder, self.repository = uuid.uuid4().hex, folder, repository
        self.run = run or folder / "run"
        self.before = shared_memory.names()
        (folder / "tmp").mkdir(parents=True)
        self.process = subprocess.Popen(
            [sys.executable, "-P", *program, "--port=0", "--http-port=0", "--metrics-port=0",
             f"--drain-seconds={DRAIN}", f"--repository={repository}", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"SERVED": self.mark, "TRITONSPEED_RUN": str(self.run), "TMPDIR": str(folder / "tmp")},
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0),  # with pytest, however it ends
        )  # fmt: skip
        self.said, self.ready = "", threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self, timeout=240):
        """Until it serves."""
        end = time.monotonic() + timeout
        while not self.ready.wait(0.1):
            lives = self.process.poll() is None and time.monotonic() < end
            assert lives, f"the server did not start:\n{self.said}\n{self._state()}"
        found = re.search(r":(\d+) \(gRPC\), (\d+) \(HTTP\), (\d+) \(metrics\), (\d+) \(health\)", self.said)
        self.ports = [int(port) for port in found.groups()]
        self.port, self.http, self.metrics, self.health_port = self.ports
        self._channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self

    def stop(self, how=signal.SIGINT):
        """The launcher's exit status."""
        if hasattr(self, "_channel"):
            self._channel.close()
        self.process.send_signal(how)
        try:
            return self.process.wait(LIMIT)
        finally:
            for process in self.processes():
                process.kill()

    def left(self):
        """What is still there of it: processes, ports, files; nothing once it has been stopped."""
        found = [f"process {process}" for process in gone(self.processes())]
        found += [f"port {port}" for port in getattr(self, "ports", ()) if not _free(port)]
        ours = (f"tritonspeed_{self.process.pid}_", "deepspeed_allreduce_buffer_", "triton_python_backend")
        found += shared_memory.forgotten(ours, self.before)
        found += [str(path) for path in (self.folder / "tmp").iterdir()]
        return found + [str(path) for path in self.run.glob(f"server-{self.process.pid}*")]

    def processes(self, word=""):
        """Everything of it that lives, narrowed to command lines with `word`."""
        return [p for p in psutil.process_iter() if _belongs(p, self.mark, word)]

    def family(self, model):
        """A model's stub and its ranks; None while there are several of it, as in a reload."""
        stubs = [p for p in self.processes("triton_python_backend_stub") if f"/{model}/" in _words(p)]
        if len(stubs) != 1:
            return None
        return stubs[0], [p for p in _children(stubs[0]) if "backend.ranks.rank" in _words(p)]

    # ---- asking

    def of(self, task, model=None, **options):
        """A pipeline of any task."""
        return pipeline(task, model, "127.0.0.1", self.port, **options)

    def pipeline(self, model, **options):
        return self.of("generate", model, **options)

    def async_pipeline(self, model, **options):
        return async_pipeline("generate", model, "127.0.0.1", self.port, **options)

    def control(self):
        return Control(Endpoint.of("127.0.0.1", self.port))

    def ask(self, *requests, timeout=60):
        """A gRPC stream's call: iterating it gives Triton's messages."""
        return self.stub.ModelStreamInfer(iter(requests), timeout=timeout)

    def post(self, path, body, timeout=60):
        """Status and text of the HTTP answer; `body` is JSON to be, or bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/models/{path}", data, timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def health(self):
        """Nothing, or what the launcher says is wrong."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/health", timeout=20) as answer:
                assert answer.read() == b"ok\n"
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode().strip() if error.code == 503 else f"status {error.code}"

    def _state(self):
        """For the message of a server that does not come up."""
        logs = [log.read_text()[-3000:] for log in self.run.glob("*.log")]
        return "\n".join([*logs, *(f"{p.pid} {p.status()} {' '.join(p.cmdline())[:150]}" for p in self.processes())])

    def _read(self):
        with self.process.stderr as lines:
            for line in lines:
                self.said += line
                if line.startswith("ready after"):
                    self.ready.set()


def request(model, text=None, parameters=None, name="", **tensors):
    """One that asks for the empty final response, with `name` as id; scalars become [1, 1], lists [1, k]."""
    given = tensors if text is None else {"text_input": text, **tensors}
    made = encode(model, {name: _tensor(name, value) for name, value in given.items()})
    made.id = name
    fields = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for key, value in {"triton_enable_empty_final_response": True, **(parameters or {})}.items():
        setattr(made.parameters[key], fields[type(value)], value)
    return made


def _tensor(name, value):
    if isinstance(value, np.ndarray):
        return value
    given = value if isinstance(value, list) else [value]
    values = [each.encode() if isinstance(each, str) else each for each in given]
    return np.array([values], TYPES.get(name, "?" if isinstance(values[0], bool) else object))


def answers(call):
    """The responses that hold tensors, decoded, each with its request's id; an error in a message is raised as text."""
    found = []
    for message in call:
        assert not message.error_message, message.error_message
        if message.infer_response.outputs:
            found.append(decode(message.infer_response) | {"id": message.infer_response.id})
    return found


def finals(messages):
    """How often each request's id was ended."""
    ends = [m.infer_response.id for m in messages if m.infer_response.parameters["triton_final_response"].bool_param]
    return {name: ends.count(name) for name in ends}


def failure(call):
    """The only message of a call that must fail; it also ends the request."""
    (message,) = call
    assert message.error_message and finals([message]) == {message.infer_response.id: 1}
    return message.error_message


def events(text):
    """The JSON of an answer of generate_stream."""
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def gone(processes, seconds=30):
    """Those that still live after so long."""
    return psutil.wait_procs(processes, timeout=seconds)[1]


def _words(process):
    """Its command line; nothing of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _children(process):
    try:
        return process.children()
    except psutil.Error:
        return []


def _belongs(process, mark, word):
    try:
        ours = process.environ().get("SERVED") == mark and process.status() != psutil.STATUS_ZOMBIE
        return ours and word in " ".join(process.cmdline())
    except (psutil.Error, OSError):
        return False


def _free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
