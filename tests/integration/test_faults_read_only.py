"""Models from a file system that nobody can write to. docs/faults.md, 28."""

import subprocess

import pytest
import serving
import tiny_encoders
from serving import answers, request, running
from tiny import save_llama

from backend import repository

pytestmark = pytest.mark.server


def unshared(folder, *line):
    """A command that sees the folder read-only, whoever it runs as."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", mount, str(folder), *line]


@pytest.fixture
def read_only(monkeypatch):
    """Servers see this folder read-only."""
    start = subprocess.Popen

    def protect(folder):
        tried = subprocess.run(unshared(folder, "touch", str(folder / "new")), capture_output=True, text=True)
        if "Read-only file system" not in tried.stderr:
            pytest.skip("namespaces are not permitted here")
        monkeypatch.setattr(serving.subprocess, "Popen", lambda line, **more: start(unshared(folder, *line), **more))

    return protect


@pytest.fixture
def folder(tmp_path):
    """`models`, a repository, beside it the checkpoints."""
    llama = save_llama(tmp_path / "llama")
    bert = tiny_encoders.write(tmp_path / "bert", "bert", "AutoModel")
    tiny_encoders.save_tokenizer(bert)
    repository.write(tmp_path / "models", "generate", "tiny", {"model": str(llama), "max_sequences": "4"})
    repository.write(tmp_path / "models", "embed", "vectors", {"model": str(bert)})
    return tmp_path


def test_a_read_only_model_repository(folder, read_only, tmp_path_factory):
    read_only(folder)
    with running(tmp_path_factory.mktemp("served"), folder / "models", "--explicit") as server:
        ask = request("tiny", "the", max_tokens=8, temperature=0.0)
        (before,) = answers(server.ask(ask))
        assert server.of("embed", "vectors")("the").shape == (32,)
        with server.control() as control:
            control.unload("tiny", 60)
            control.wait_gone("tiny", 60)
            control.load("tiny", 120)
        (after,) = answers(server.ask(ask))
        assert after["text_output"] == before["text_output"]
        assert server.health() is None
    assert sorted(folder.rglob("__pycache__")) == []
