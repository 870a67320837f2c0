"""Offload in rank processes: in less memory than its weights a model writes the same text; killed, nothing stays."""

import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from decoding import play, sequence, settings
from processes import ranks
from safetensors.torch import load_file, save_file
from tiny import save_llama

from backend.errors import EngineDown
from backend.generation.sequence import SamplingParams
from backend.ranks.group import RankGroup

FAKES = str(Path(__file__).parents[2] / "fakes")
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
SIZE = 12 * 9 << 20
"""Bytes of the layers' weights, about."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve layers of 9 MiB, drawn without a model around them."""
    folder = save_llama(
        tmp_path_factory.mktemp("large"), num_hidden_layers=1, hidden_size=512, intermediate_size=1024,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    _deepen(folder, 12)
    return folder


def _deepen(folder, count):
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, generator = load_file(file), torch.Generator().manual_seed(1)
    for name, value in [(name, value) for name, value in tensors.items() if ".0." in name]:
        for layer in range(1, count):
            noise = torch.randn(value.shape, generator=generator) * 0.05 if value.dim() > 1 else 0
            tensors[name.replace(".0.", f".{layer}.")] = value + noise
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(config.read_text().replace('"num_hidden_layers": 1', f'"num_hidden_layers": {count}'))


def written(config, after=lambda group: None):
    """What ranks write, and the most memory that rank 0 took."""
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join([FAKES, os.environ.get("PYTHONPATH", "")])}):
        group = RankGroup(config, "measured_decoder:Measured", lambda line: None)
        group.start()
    try:
        group.call("allocate", 16, 64)
        group.call("warm_up")
        sequences = [sequence(list(range(3, 3 + count)), GREEDY) for count in (5, 11)]
        play(lambda plan: group.call("step", plan)[0], sequences, config, 16)
        most = group.call("most")[0]
        after(group)
        return [list(each.tokens) for each in sequences], most
    finally:
        group.close()


@pytest.fixture(scope="module")
def plain(folder):
    return written(settings(folder))


def test_from_disk_it_takes_a_fraction_of_the_memory_and_a_killed_rank_leaves_nothing(folder, plain, tmp_path):
    def kill(group):
        assert list(tmp_path.iterdir()) == []
        os.kill(ranks()[0], signal.SIGKILL)
        with pytest.raises(EngineDown):
            group.call("most")

    tokens, most = written(settings(folder, offload="nvme", offload_folder=str(tmp_path)), kill)
    assert tokens == plain[0]
    assert plain[1] > 0.9 * SIZE and most < 0.5 * SIZE, (plain[1] >> 20, most >> 20)
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_each_stream_their_share_from_memory(folder, plain):
    assert written(settings(folder, offload="cpu", tensor_parallel=2))[0] == plain[0]
