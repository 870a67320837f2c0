"""The output proof passes what is right, and names the part that is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import nn

from backend.compute import proof
from backend.compute.blocks import Block
from backend.compute.dense import reference
from backend.compute.graphs import sizes
from backend.compute.quantized import cpu, product
from backend.compute.quantized.layer import PackedLinear
from backend.compute.quantized.packed import Scheme, pack
from backend.errors import LoadError

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import families
from decoding import settings
from fused_decoding import FusedDecoders, Uncaptured

from backend.compute import decoder as decoders
from backend.config import EngineConfig
from backend.ranks.rank import Birth


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    torch.set_num_threads(1)
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def opened(folder: Path, lines: list[str], **given: Any) -> Any:
    """A decoder with fused layers and whole steps, on CPU."""
    rank = FusedDecoders(Birth("", EngineConfig(model=""), 0, 1, "", 0), lines.append)
    config = settings(folder, **given)
    rank.open(config, 60)
    decoder: Any = rank.decoder
    with patch.object(decoders, "DecodeGraph", Uncaptured):
        decoder._graphs = {size: decoder._capture(size) for size in sizes(config.max_sequences)}
    return decoder


def test_what_is_right_passes_and_is_told(folder: Path) -> None:
    lines: list[str] = []
    decoder = opened(folder, lines)
    blocks = [module.forward for module in decoder._model.modules() if isinstance(module.forward, Block)]
    assert decoder.prove() < 1e-4
    assert "output proof: logits within" in lines[-1]
    after = [module.forward for module in decoder._model.modules() if isinstance(module.forward, Block)]
    assert blocks and blocks == after  # what stood aside for the plain computation is back


def test_a_wrong_block_is_named(folder: Path) -> None:
    decoder = opened(folder, [])
    usual = Block._mlp

    def wrong(self: Any, *given: Any) -> Any:
        return (usual(self, *given), given[0].mul_(1.02))[0]

    with patch.object(Block, "_mlp", wrong), pytest.raises(LoadError, match="set fused_kernels to false"):
        decoder.prove()
    decoder.prove()


def test_a_wrong_graph_is_named(folder: Path) -> None:
    decoder = opened(folder, [])

    def stale(self: Any, plan: Any) -> Any:
        return torch.zeros(1, families.VOCAB), torch.zeros(1, dtype=torch.int32)

    with patch.object(Uncaptured, "replay", stale), pytest.raises(LoadError, match="set cuda_graphs to false"):
        decoder.prove()


def test_a_wrong_product_of_packed_weights_is_noticed(folder: Path) -> None:
    """A few numbers in a hundred, as of one group's scale that is taken for another's."""
    decoder, usual = opened(folder, [], quantization="fp8"), reference.product

    def wrong(x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        found = usual(x, weight, bias)
        found[:, ::32] *= 2
        return found

    decoder.prove()
    with patch.object(reference, "product", wrong), pytest.raises(LoadError, match="output proof: with fused_kernels"):
        decoder.prove()


def test_a_cache_of_float8_may_differ_more_in_any_dtype() -> None:
    plain = torch.linspace(0, 1, 9)[None]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert proof.check({"fused_kernels": plain + 0.15}, plain, dtype, torch.float8_e4m3fn) > 0.1
        with pytest.raises(LoadError, match=r"differs from the plain computation by 0\.15"):
            proof.check({"fused_kernels": plain + 0.15}, plain, dtype, dtype)
    with pytest.raises(LoadError, match=r"with quantization .* 0.2 are allowed; serve it without"):
        proof.check({"quantization": plain + 0.3}, plain, torch.bfloat16, torch.float8_e4m3fn)


def test_a_model_that_amplifies_rounding_may_differ_more() -> None:
    plain, asked = torch.linspace(0, 1, 9)[None], []

    def noise(share: float) -> Any:
        return lambda: asked.append(share) or share

    off = {"fused_kernels": plain + 0.15, "cuda_graphs": plain + 0.16}
    assert proof.check(off, plain, torch.bfloat16, noise=noise(0.06)) > 0.15
    assert asked == [0.06]  # once: it costs another computation
    with pytest.raises(LoadError, match=r"with fused_kernels .* 0.15 .* 0.09 are allowed"):
        proof.check(off, plain, torch.bfloat16, noise=noise(0.03))
    with pytest.raises(LoadError, match=r"with quantization .* 0.5 "):
        proof.check({"quantization": plain + 0.5}, plain, torch.bfloat16, noise=noise(1.0))
    assert asked == [0.06, 0.03]  # past what any model may


def test_noise_is_what_rounding_makes(tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        families.write("llama", tmp_path / "llama")
    ).bfloat16()
    ids = (torch.arange(40) * 7919 % model.config.vocab_size)[None]
    with torch.inference_mode():
        plain = model(ids).logits[0]
        with proof.shaken(model.model.layers, torch.bfloat16):
            noise = proof.difference(model(ids).logits[0], plain)
        with proof.shaken(model.model.layers, torch.bfloat16, torch.float8_e4m3fn):
            coarse = proof.difference(model(ids).logits[0], plain)
        assert torch.equal(model(ids).logits[0], plain)
        rounding = proof.difference(plain, model.float()(ids).logits[0])
    assert rounding / 4 < noise < rounding * 4 and coarse > 4 * noise


def test_numbers_that_only_one_way_has_are_a_difference() -> None:
    plain = torch.randn(2, 9)
    broken = plain.clone()
    broken[1, 3] = torch.nan
    assert proof.difference(plain, plain) == 0 and proof.difference(broken, broken) == 0
    assert proof.difference(broken, plain) == float("inf")
    with pytest.raises(LoadError, match="output proof: with cuda_graphs"):
        proof.check({"fused_kernels": plain, "cuda_graphs": broken}, plain, torch.bfloat16)


def test_packed_weights_are_multiplied_by_torch_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "product", lambda x, weight, bias: x.new_zeros(len(x), weight.shape[0]))
    monkeypatch.setattr(product, "AT_ONCE", 4 * 64)  # two slices, and what is left
    weight, given = pack(torch.randn(9, 64), Scheme("int8", 0)), torch.randn(3, 64)
    layer = PackedLinear(weight, None, "whole", {}, None)
    with proof.plain_modules(layer):
        torch.testing.assert_close(layer(given), nn.functional.linear(given, weight.full()))
    with proof.plain_modules(layer, products=False):
        assert not layer(given).any()
    assert not layer(given).any()


def test_modules_compute_plainly_meanwhile() -> None:
    layer: Any = nn.Linear(2, 2)
    layer.forward = lambda x: x * 0
    given = torch.ones(1, 2)
    with proof.plain_modules(layer):
        assert torch.equal(layer(given), nn.functional.linear(given, layer.weight, layer.bias))
    assert not layer(given).any()
