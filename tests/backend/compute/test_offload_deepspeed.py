"""Offload beside DeepSpeed's own engine for it: the same logits."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))

from tiny import save_llama  # noqa: E402

from backend.compute.load import load  # noqa: E402
from backend.compute.offload.offload import Offload  # noqa: E402
from backend.compute.tensor_parallel import connect  # noqa: E402
from backend.config import EngineConfig  # noqa: E402

TOKENS = 24
CPU = torch.device("cpu")

pytestmark = pytest.mark.slow


def test_the_logits_are_those_of_zero_inference(tmp_path):
    folder = save_llama(tmp_path / "model", num_hidden_layers=4)
    command = [sys.executable, str(FAKES / "zero_inference.py"), str(folder), str(TOKENS), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    config = EngineConfig(model=str(folder), device="cpu", offload="nvme", offload_folder=str(tmp_path))
    held = Offload.of(config, 1, CPU)
    with patch.dict(os.environ):
        connect(0, 1, CPU, tmp_path)
        model = load(config, 0, 1, CPU, torch.float32, attention="sdpa", offload=held)
    with torch.inference_mode():
        logits = model(torch.arange(TOKENS)[None], use_cache=False).logits[0]
    assert "4 of 4 layers come from a file" in held.told
    assert torch.allclose(logits, torch.load(tmp_path / "logits.pt"), atol=1e-5)
