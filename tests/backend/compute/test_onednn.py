"""Products by oneDNN: the numbers of torch's own, where they are used, and what is put in place and taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backend.compute import onednn
from backend.compute.proof import plain_modules
from backend.compute.tensor_parallel import VocabParallelHead

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("least", [0, 1 << 14])
@pytest.mark.parametrize("shape", [(1, 24), (17, 24), (3, 50, 24), (0, 24), (2, 0, 24)])
def test_the_numbers_of_torch(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool, least: int) -> None:
    monkeypatch.setattr(onednn, "LEAST", least)
    torch.manual_seed(0)
    x, table = torch.randn(shape), torch.randn(90, 24)
    weight, given = table[10:50], torch.randn(40) if bias else None  # rows of a larger one, as a tied head has
    with torch.inference_mode():
        torch.testing.assert_close(onednn.linear(x, weight, given), nn.functional.linear(x, weight, given))


def test_inputs_may_be_strided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "LEAST", 0)
    x, weight = torch.randn(4, 30, 48)[:, ::2, 1::2], torch.randn(16, 24)
    torch.testing.assert_close(onednn.linear(x, weight, None), nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    ("vendor", "capability", "device", "dtype", "pays"),
    [
        ("AuthenticAMD", "AVX512", "cpu", torch.float32, True),
        ("GenuineIntel", "AVX512", "cpu", torch.float32, False),
        ("AuthenticAMD", "AVX2", "cpu", torch.float32, False),
        ("AuthenticAMD", "AVX512", "cpu", torch.bfloat16, False),
        ("AuthenticAMD", "AVX512", "cuda", torch.float32, False),
    ],
)
def test_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, device: str, dtype: torch.dtype, pays: bool
) -> None:
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn.pays(torch.device(device), dtype) is pays


def test_what_is_put_in_place_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    head = VocabParallelHead(50, 24, False, 0, 1, torch.float32).to_empty(device="cpu")
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24), head)
    nn.init.normal_(head.weight)
    model[2].weight.data = model[2].weight.data.double()
    model[2] = model[2].double()
    assert onednn.install(model) == 2
    calls: list[torch.Size] = []
    linear = onednn.torchs
    monkeypatch.setattr(onednn, "torchs", lambda x, weight, bias: calls.append(x.shape) or linear(x, weight, bias))
    x = torch.randn(2, 24)
    own = head(model[0](x))
    assert len(calls) == 2
    with plain_modules(model):
        plain = head(model[0](x))
    assert len(calls) == 2
    torch.testing.assert_close(own, plain)
    head(model[0](x))
    assert len(calls) == 4
