"""Which Python the ranks run in."""

import shutil
import sys

import pytest

from backend.interpreter import python


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.delenv("TRITONSPEED_PYTHON", raising=False)


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("TRITONSPEED_PYTHON", "/chosen")
    assert python() == "/chosen"


def test_this_process_s_own_goes_before_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert python() == sys.executable


@pytest.mark.parametrize("executable", ["", "/opt/backends/triton_python_backend_stub"])
def test_the_stub_is_no_interpreter(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    assert python() == shutil.which("python3")
