"""One server for the whole folder: SmolLM2 in float32, tiny models, and models that cannot load."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fakes")]

from serving import Served
from tiny import save_llama

from backend import repository


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama of random weights whose texts may be 8,192 tokens long."""
    return save_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192)


@pytest.fixture(scope="session")
def models(tmp_path_factory, smollm2, tiny):
    """The repository: smollm2; tiny; single, which works on one request at a time and lets two wait."""
    folder = tmp_path_factory.mktemp("repository")
    repository.write(folder, "generate", "smollm2", {"model": str(smollm2), "dtype": "float32", "max_sequences": "32"})
    repository.write(folder, "generate", "tiny", {"model": str(tiny), "max_sequences": "64", "max_model_len": "512"})
    repository.write(folder, "generate", "single", {"model": str(tiny), "max_sequences": "1", "max_waiting": "2"})
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory, models):
    """The server, with everything loaded; at the end nothing of it may be left."""
    server = Served(tmp_path_factory.mktemp("served"), models, "--explicit", "--keep-going")
    try:
        yield server.wait()
    finally:
        status = server.stop()
    assert status == 0, server.said
    assert server.left() == []
