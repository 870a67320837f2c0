"""Models whose layers lie elsewhere in a real tritonserver: the same text, the same vectors, no file left."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))
from serving import running
from tiny import save_llama
from tiny_encoders import write

from backend import repository

pytestmark = pytest.mark.server

SMALL = {"device": "cpu", "threads": "1"}
TEXTS = ["the quick brown fox", "rivers", "She hated that boring, terrible book!"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Each model twice: as usual, and with its layers in a file or in host memory."""
    models, folders = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("models")
    llama = {"model": str(save_llama(folders / "llama", num_hidden_layers=5)), "num_blocks": "64"} | SMALL
    bert = {"model": str(write(folders / "bert", "bert", "AutoModel", num_hidden_layers=4))} | SMALL
    (folders / "disk").mkdir()
    disk = {"offload": "nvme", "offload_folder": str(folders / "disk"), "max_sequences": "8"}
    for task, name, given in (
        ("generate", "whole", llama | {"max_sequences": "8"}),
        ("generate", "disk", llama | disk),
        ("embed", "vectors", bert),
        ("embed", "streamed", bert | {"offload": "cpu"}),
    ):
        repository.write(models, task, name, given)
    with running(tmp_path_factory.mktemp("served"), models, "--explicit") as server:
        yield server
        assert list((folders / "disk").iterdir()) == []


def test_the_text_is_the_same(server):
    with server.pipeline("whole") as whole, server.pipeline("disk") as disk:
        for text in TEXTS:
            asked = {"max_tokens": 12, "temperature": 0.0}
            assert disk(text, **asked).text == whole(text, **asked).text
    assert "offload: 4 of 5 layers come from a file in" in server.said


def test_the_vectors_are_the_same(server):
    with server.of("embed", "vectors") as vectors, server.of("embed", "streamed") as streamed:
        assert np.array_equal(np.asarray(streamed(TEXTS)), np.asarray(vectors(TEXTS)))
    assert "offload: 4 of 4 layers come from host memory" in server.said
