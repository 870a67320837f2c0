"""What a model's weights take is what was forecast from its files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from backend.compute.footprint import footprint
from backend.compute.load import load
from backend.config import EngineConfig
from backend.fit import check

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import families
from tiny import save_llama


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """DeepSpeed in this process sets variables."""
    with patch.dict(os.environ):
        yield


def both(folder: Path, **parameters: Any) -> tuple[int, int]:
    """Bytes forecast, and held."""
    config = EngineConfig(model=str(folder), device="cpu", **parameters)
    model = load(config, 0, 1, torch.device("cpu"), getattr(torch, parameters.get("dtype", "float32")))
    return check(config).weights, footprint(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("quantization", "symmetric"),
    [("", None), ("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8", True)],
)
def test_of_a_llama(dtype: str, quantization: str, symmetric: bool | None, tmp_path: Path) -> None:
    folder = save_llama(tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4)
    forecast, held = both(folder, dtype=dtype, quantization=quantization, quantization_symmetric=symmetric)
    assert held == pytest.approx(forecast, rel=0.05)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral", "opt", "qwen3_moe"])
def test_of_other_families(family: str, tmp_path: Path) -> None:
    """Tied heads, transposed layers, experts, positions that are learned."""
    if family not in families.FAMILIES | families.REFUSED:
        pytest.skip(f"no tiny {family}")
    forecast, held = both(families.write(family, tmp_path))
    assert held == pytest.approx(forecast, rel=0.05)
