"""One server for the whole folder: SmolLM2 in float32, tiny models, and models that cannot load."""

import pickle
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fakes")]

import families  # noqa: E402
from serving import running  # noqa: E402
from tiny import save_llama  # noqa: E402

from backend import repository  # noqa: E402

REPAIR = 0.05
"""Minutes between two tries of loading anew what has failed for good."""


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
    _write_broken(folder, smollm2, tmp_path_factory.mktemp("broken"))
    return folder


def _write_broken(folder, smollm2, place):
    """Models that cannot load, by what is wrong with them: `misspelt`, `missing`, `pickled`, `phi3`, `heads`."""
    (pickled := place / "pickled").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(smollm2 / name, pickled)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 0}))
    wrong = {
        "misspelt": {"model": str(smollm2)},
        "missing": {"model": str(place / "nothing")},
        "pickled": {"model": str(pickled)},
        "phi3": {"model": str(families.write("phi3", place / "phi3")), "tensor_parallel": "2"},
        "heads": {"model": str(smollm2), "tensor_parallel": "4"},
    }
    for name, parameters in wrong.items():
        repository.write(folder, "generate", name, parameters)
    config = folder / "misspelt" / "config.pbtxt"  # which the writer would have refused
    config.write_text(config.read_text() + 'parameters { key: "max_sequencs" value { string_value: "3" } }')


@pytest.fixture(scope="session")
def served(tmp_path_factory, models):
    """The server, with everything loaded; at the end nothing of it may be left."""
    options = "--explicit", "--keep-going", f"--repair-minutes={REPAIR}"
    with running(tmp_path_factory.mktemp("served"), models, *options) as server:
        yield server
