"""A model whose logits are not finite for one request, in a real rank: that request fails, its neighbour does not."""

import sys
import threading
from array import array
from pathlib import Path

import pytest

from backend.config import EngineConfig
from backend.errors import ServingError
from backend.generation.engine import Engine
from backend.generation.prompt import Prompt
from backend.generation.sequence import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))
from tiny import save_llama

POISON = 250
PARAMS = SamplingParams(max_tokens=60, temperature=0.0)


def test_a_request_of_broken_logits_fails_alone(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    engine = Engine(EngineConfig(model=str(tmp_path), device="cpu", threads=1), report=lambda line: None)
    engine.start()
    try:
        tokens = []

        def neighbour():
            for deltas in engine.run([Prompt(array("i", [5, 6]), PARAMS)], timeout=60):
                tokens.extend(deltas[0].token_ids)

        thread = threading.Thread(target=neighbour)
        thread.start()
        with pytest.raises(ServingError, match="not finite"):
            list(engine.run([Prompt(array("i", [5, POISON]), PARAMS)], timeout=60))
        thread.join()
        assert len(tokens) == 60
        assert engine.tally.restarts == 0
    finally:
        engine.close()
