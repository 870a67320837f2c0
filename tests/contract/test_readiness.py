"""`is_ready` of every model.py, which Triton 26.03 and later ask: what the service says of itself, each time anew."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent.name for path in (ROOT / "model_repository").glob("*/config.pbtxt"))


def loaded(name, file):
    """A module of this file, not kept by that name."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model_of(monkeypatch):
    """A task's module model.py, over as much of Triton's module as importing it takes."""
    fake = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.setitem(sys.modules, "backend.triton", loaded("backend.triton", ROOT / "backend" / "triton.py"))
    return lambda task: loaded(f"model_of_{task}", ROOT / "model_repository" / task / "1" / "model.py")


def test_there_are_nine():
    assert len(FOLDERS) == 9


@pytest.mark.parametrize("task", FOLDERS)
def test_a_model_is_ready_while_its_service_is_healthy(task, model_of):
    module = model_of(task)
    assert isinstance(module.Service.healthy, property)  # what the fake stands for
    model = module.TritonPythonModel()
    model.service = types.SimpleNamespace(healthy=True)
    for healthy in (True, False, True):
        model.service.healthy = healthy
        assert model.is_ready() is healthy
