"""A server that others can reach: its own APIs want the admin key, over both ways; inference does not.

The PyPI server must not listen beyond this machine, so only the launcher believes that it does. docs/faults.md, 26.
"""

import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from serving import running
from tritonclient.grpc import service_pb2 as pb

from backend.launcher.repair import reach
from backend.launcher.tritonserver import Ports

pytestmark = pytest.mark.server

REPOSITORY = Path(__file__).resolve().parents[1] / "fakes" / "repository"
KEY = "the-admins-own"
AS_IF_ELSEWHERE = """
import sys
from backend import server
from backend.launcher import tritonserver
tritonserver.Ports.loopback = property(lambda ports: False)
tritonserver.check_host = lambda *given: None
sys.exit(server.main())
"""
GRPC_HEADER, HTTP_HEADER = "triton-grpc-protocol-admin-key", "admin-key"
"""Triton puts something before the name over gRPC."""
CALLS = {
    "RepositoryIndex": pb.RepositoryIndexRequest(),
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="echo"),
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "ModelConfig": pb.ModelConfigRequest(name="echo"),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}
PATHS = {
    "repository/index": b"{}",
    "repository/models/echo/load": b"{}",
    "systemsharedmemory/status": None,
    "cudasharedmemory/status": None,
    "models/echo/config": None,
    "trace/setting": None,
    "logging": None,
}
"""With what is posted."""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Nothing is unloaded by a load: 2.51 loads a model anew in its place."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITONSPEED_ADMIN_KEY", KEY)
        program = ("-c", AS_IF_ELSEWHERE)
        with running(tmp_path_factory.mktemp("served"), REPOSITORY, "--explicit", program=program) as server:
            yield server


def called(server, name, *headers):
    """The status of a gRPC call."""
    try:
        getattr(server.stub, name)(CALLS[name], timeout=30, metadata=headers)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


def asked(server, path, headers=None, body=None):
    """The status of an HTTP call."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.http}/v2/{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize("name", CALLS)
def test_over_grpc_a_call_wants_the_key(elsewhere, name):
    for headers in ([], [(GRPC_HEADER, "guessed")], [(GRPC_HEADER, "")]):
        status, reason = called(elsewhere, name, *headers)
        assert status == "UNAVAILABLE" and "restricted" in reason
    assert called(elsewhere, name, (GRPC_HEADER, KEY)) == ("OK", "")


@pytest.mark.parametrize("path", PATHS)
def test_over_http_a_call_wants_the_key(elsewhere, path):
    for headers in ({}, {HTTP_HEADER: "guessed"}, {HTTP_HEADER: ""}):
        assert asked(elsewhere, path, headers, PATHS[path]) == 403
    assert asked(elsewhere, path, {HTTP_HEADER: KEY}, PATHS[path]) == 200


def test_inference_and_health_want_none(elsewhere):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [0.0]}
    assert elsewhere.post("echo/infer", {"inputs": [tensor]})[0] == 200
    assert asked(elsewhere, "health/ready") == asked(elsewhere, "models/echo/ready") == 200
    assert elsewhere.stub.ServerReady(pb.ServerReadyRequest(), timeout=30).ready
    assert elsewhere.health() is None


def test_the_launchers_own_way_has_the_key(elsewhere):
    """Else nothing is repaired or dismissed there."""
    with reach(Ports("127.0.0.1", elsewhere.port, elsewhere.http, elsewhere.metrics), KEY)() as control:
        assert [model.name for model in control.models()] == ["echo"]
