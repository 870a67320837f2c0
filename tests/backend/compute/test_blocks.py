"""Fused decoder layers give the logits of plain transformers; where the structure is not known, its own code stays."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from backend.compute import blocks, layer_parts, norms
from backend.compute.cache import KVCache, probe
from backend.compute.load import load
from backend.config import EngineConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import families

WHOLE = ["llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
"""Families all of whose layers qualify."""
PARTLY = {"smollm3": 1, "mixtral": 2, "qwen3_moe": 2}
"""How many of two layers do: SmolLM3's without rotation does not; experts are called as they are."""
NONE = sorted(families.FAMILIES.keys() - set(WHOLE) - PARTLY.keys())


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    torch.set_num_threads(1)
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = tmp_path_factory.mktemp("models")

    @cache
    def folder(name: str) -> Path:
        return families.write(name, base / name)

    return folder


def opened(folder: Path, quantization: str = "") -> tuple[Any, Any]:
    config = EngineConfig(model=str(folder), device="cpu", quantization=quantization)
    model = load(config, 0, 1, torch.device("cpu"), torch.float32, merge=True)
    return model, probe(model, "cpu")


def logits(model: Any, specs: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of one sequence in a step of its own."""
    cache = KVCache(specs, 2, ids.shape[1], torch.float32, "cpu")
    positions = torch.arange(ids.shape[1])[None]
    step = blocks._trial_step(cache, ids.shape[1])
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, step=step).logits
    return found


@pytest.mark.parametrize("name", [*WHOLE, *PARTLY, *NONE])
def test_the_logits_of_transformers(name: str, folders: Any) -> None:
    model, specs = opened(folders(name))
    report = blocks.install(model, specs, 1, torch.float32, torch.device("cpu"))
    count = 2 if name in WHOLE else PARTLY.get(name, 0)
    assert f"fused kernels compute {count} of 2 layers" in report
    assert sum(isinstance(module.forward, blocks.Block) for module in model.modules()) == count
    replaced = norms.replace(model)
    assert replaced >= (1 if count else 0)
    want = families.expected(folders(name))
    for tokens in (24, 7):  # beyond and within the kernels for few tokens
        for row in range(2):
            found = logits(model, specs, families.inputs()[row : row + 1, :tokens])
            torch.testing.assert_close(found[0], want[row, :tokens], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["llama-bias", "gemma2"])
def test_packed_layers_are_computed_as_well(name: str, folders: Any) -> None:
    """With the same weights, so the same logits; and not those of the full ones."""
    model, specs = opened(folders(name), "fp8")
    ids = families.inputs()
    before = [logits(model, specs, ids[:1, :tokens]) for tokens in (24, 7)]
    report = blocks.install(model, specs, 1, torch.float32, torch.device("cpu"))
    assert "fused kernels compute 2 of 2 layers" in report
    for tokens, want in zip((24, 7), before, strict=True):
        torch.testing.assert_close(logits(model, specs, ids[:1, :tokens]), want, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(before[0][0], families.expected(folders(name))[0, :24], atol=2e-4)


def test_a_layer_that_computes_something_else_keeps_its_code(folders: Any) -> None:
    model, specs = opened(folders("llama"))
    layer = model.model.layers[1]
    usual = layer.forward

    def doubled(hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        found: torch.Tensor = usual(hidden_states, **named)
        return hidden_states + (found - hidden_states) * 1.3

    layer.forward = doubled
    report = blocks.install(model, specs, 1, torch.float32, torch.device("cpu"))
    assert "1 of 2 layers" in report and "its result differs" in report
    assert isinstance(model.model.layers[0].forward, blocks.Block) and layer.forward is doubled


def test_names_that_are_not_known_disqualify(folders: Any) -> None:
    model, specs = opened(folders("granite"))
    assert "residual_multiplier" in blocks.install(model, specs, 1, torch.float32, torch.device("cpu"))


def test_unmerged_projections_disqualify(folders: Any) -> None:
    model, specs = opened(folders("llama"))
    model.model.layers[0].self_attn.q_proj = nn.Linear(72, 72)
    reason = layer_parts.parts_of(model.model.layers[0], specs[0])
    assert reason == "its projections are not merged"


class Shifted(nn.Module):
    """Neither weight nor one more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (2 + self.weight)


def test_norms_are_known_by_what_they_do() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    llama, gemma = LlamaRMSNorm(16), GemmaRMSNorm(16)
    with torch.no_grad():
        for norm in (llama, gemma):
            norm.weight.normal_()
            found = norms.recognised(norm)
            assert found is not None
            torch.testing.assert_close(found.weight, norm.weight.float() + (norm is gemma))
        for strange in (Shifted(), nn.LayerNorm(16), nn.Linear(2, 2), SimpleNamespace(weight=1)):
            assert norms.recognised(strange) is None


def test_replaced_norms_give_the_same() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    model = nn.Sequential(GemmaRMSNorm(16), nn.Linear(16, 16), Shifted())
    with torch.no_grad():
        model[0].weight.normal_()
        given = torch.randn(2, 3, 16)
        want = model(given)
        assert norms.replace(model) == 1
        torch.testing.assert_close(model(given), want)
