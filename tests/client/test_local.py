"""The register of local servers."""

import json
import os
import stat
import subprocess
import sys

import pytest

from client import local


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONSPEED_RUN", str(tmp_path / "run"))
    return tmp_path / "run"


def test_announced_found_withdrawn(run_folder, tmp_path):
    assert local.find(8001) is None
    server = local.announce(8001, 8000, tmp_path, explicit=True)
    assert server == local.Server(os.getpid(), 8001, 8000, str(tmp_path), True)
    assert local.find(8001) == server
    assert local.find(8002) is None
    assert stat.S_IMODE(run_folder.stat().st_mode) == 0o700
    assert [path.name for path in run_folder.iterdir()] == ["8001.json"]
    local.withdraw(8001)
    assert local.find(8001) is None
    assert not list(run_folder.iterdir())


def test_a_dead_launchers_server_is_not_found(run_folder, tmp_path):
    code = "from client import local; from pathlib import Path; local.announce(8001, 8000, Path('/r'), True)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (run_folder / "8001.json").exists()
    assert local.find(8001) is None
    assert local.announce(8001, 1, tmp_path, explicit=False) == local.find(8001)


def test_only_what_this_process_announced_is_withdrawn(run_folder, tmp_path):
    server = local.announce(8001, 8000, tmp_path, explicit=True)
    other = {**vars(server), "pid": os.getppid()}
    (run_folder / "8001.json").write_text(json.dumps(other))
    local.withdraw(8001)
    assert local.find(8001) == local.Server(**other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', '{"pid": "x"', "null"])
def test_a_broken_file_is_no_server(run_folder, text):
    run_folder.mkdir()
    (run_folder / "8001.json").write_text(text)
    assert local.find(8001) is None


def test_the_default_folder_is_the_users_own(monkeypatch):
    monkeypatch.delenv("TRITONSPEED_RUN")
    assert local.folder().name == f"tritonspeed-{os.getuid()}"
