"""Offload on CUDA: copies beside computing never reach a slot too early or too late, and text and vectors stay."""

import sys
import tempfile
from array import array
from pathlib import Path

import pytest

from backend.config import EngineConfig
from backend.generation.engine import Engine
from backend.generation.prompt import Prompt
from backend.generation.sequence import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))
from tiny import save_llama

pytestmark = pytest.mark.gpu
CACHE = Path(__file__).parents[2] / ".cache"
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = dict(hidden_size=384, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=7)
    return save_llama(tmp_path_factory.mktemp("tiny"), **shape)


@pytest.fixture
def disk():
    """tmp_path may lie in memory, where offload_folder may not."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        yield Path(folder)


@pytest.mark.parametrize("kind", ["cpu", "nvme"])
def test_every_layer_computes_on_its_own_weights(kind, disk):
    """Products large enough that copies and kernels overlap; nothing waits between the rounds."""
    import torch
    from torch import nn

    from backend.compute.offload.offload import Offload

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False, device="meta") for _ in range(9))

        def forward(self, value):
            for layer in self.layers:
                value = layer(value)
            return value

    model, cuda = Chain(), torch.device("cuda")
    given = {"offload_folder": str(disk)} if kind == "nvme" else {}
    held = Offload(EngineConfig(model="m", offload=kind, **given), 1, cuda)
    held.allocate(model)
    weights = [torch.randn(2048, 2048) / 45 for _ in model.layers]
    for layer, weight in zip(model.layers, weights, strict=True):
        layer.weight.data.copy_(weight)
    held.start()
    with torch.inference_mode():
        value = torch.randn(512, 2048, device=cuda)
        want = value
        for weight in weights:
            want = torch.nn.functional.linear(want, weight.to(cuda))
        for result in [model(value) for _ in range(20)]:
            assert torch.equal(result, want)
        held.prove(lambda: model(value))


@pytest.mark.parametrize("parameters", [{}, {"quantization": "int4"}, {"dtype": "bfloat16"}], ids=str)
def test_the_text_is_the_same(folder, disk, parameters):
    def written(**given):
        alike = {"device": "cuda", "num_blocks": "256", "max_sequences": "8", "step_tokens": "512"}
        config = EngineConfig.from_parameters({"model": str(folder), **alike, **given})
        engine = Engine(config, lambda line: None)
        try:
            engine.start()
            asked = [Prompt(array("i", range(3, 3 + count)), GREEDY) for count in (1, 5, 17, 60)]
            tokens = {}
            for deltas in engine.run(asked, timeout=60):
                for delta in deltas:
                    tokens.setdefault(delta.index, []).extend(delta.token_ids)
            return tokens
        finally:
            engine.close()

    want = written(**parameters, cuda_graphs="false")
    assert written(**parameters, offload="cpu") == want
    assert written(**parameters, offload="nvme", offload_folder=str(disk)) == want
    assert list(disk.iterdir()) == []
