"""The plain dense operations equal transformers' own modules, so that blocks made of them equal the models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.stablelm.modeling_stablelm import apply_rotary_pos_emb as apply_partial

from backend.compute.dense import reference
from backend.compute.dense.base import ACTIVATIONS, known, ops
from backend.compute.dense.shape import PROCESSORS, Shape, even, shape
from backend.errors import LoadError

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EQUAL = {torch.float32: dict(rtol=1e-5, atol=1e-6), torch.bfloat16: dict(rtol=1.6e-2, atol=1e-5)}
"""bfloat16: transformers' Llama norm rounds before its weight too."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


def filled(module: Any, dtype: torch.dtype) -> Any:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.7)
    return module.to(dtype).requires_grad_(False)


@DTYPES
def test_norms(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96).to(dtype) * 3
    llama, gemma = filled(LlamaRMSNorm(96, eps=1e-4), dtype), filled(Gemma2RMSNorm(96, eps=1e-4), dtype)
    torch.testing.assert_close(reference.normed(x, None, llama.weight, 1e-4), llama(x), **EQUAL[dtype])
    result = reference.normed(x, None, 1.0 + gemma.weight.float(), 1e-4)
    assert torch.equal(result, gemma(x)), "float32 weights keep Gemma's 1 + weight exact"
    assert not torch.equal(reference.normed(x, None, llama.weight, 1.0), llama(x))


@DTYPES
def test_update_is_added_before_the_norm(dtype: torch.dtype) -> None:
    hidden, update = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype)
    norm = filled(LlamaRMSNorm(96), dtype)
    expected = hidden + update
    result = reference.normed(hidden, update, norm.weight, norm.variance_epsilon)
    assert torch.equal(hidden, expected)
    torch.testing.assert_close(result, norm(expected), **EQUAL[dtype])


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[T, heads * D] -> [1, heads, T, D], transformers' order."""
    return x.view(1, len(x), heads, -1).transpose(1, 2)


def angles(tokens: int, turning: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(tokens) + 3.0, 10000.0 ** -(torch.arange(turning // 2) / turning * 2)).repeat(1, 2)
    return angle.cos(), angle.sin()


def test_rotation_and_cache() -> None:
    tokens, heads, kv_heads, dim = 6, 4, 2, 16
    qkv, (cos, sin) = torch.randn(tokens, (heads + 2 * kv_heads) * dim), angles(tokens, dim)
    kv, slots = torch.full((4, 4, 2, kv_heads, dim), torch.nan), torch.tensor([9, 2, 15, 4, 5, 0])
    result = reference.roped(qkv, cos, sin, kv, slots, heads, None, 0.0)
    q, k, v = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    q_heads, k_heads = apply_rotary_pos_emb(heads_first(q, heads), heads_first(k, kv_heads), cos[None], sin[None])
    torch.testing.assert_close(result, q_heads[0].transpose(0, 1))
    cached = kv.view(16, 2, kv_heads, dim)
    torch.testing.assert_close(cached[slots, 0], k_heads[0].transpose(0, 1))
    assert torch.equal(cached[slots, 1], v.view(tokens, kv_heads, dim))
    others = [slot for slot in range(16) if slot not in slots]
    assert cached[others].isnan().all()


def test_partial_rotation() -> None:
    tokens, dim, turning = 6, 16, 4
    qkv, (cos, sin) = torch.randn(tokens, 3 * dim), angles(tokens, turning)
    kv, slots = torch.zeros(2, 4, 2, 1, dim), torch.arange(tokens)
    result = reference.roped(qkv, cos, sin, kv, slots, 1, None, 0.0)
    q, k = heads_first(qkv[:, :dim], 1), heads_first(qkv[:, dim : 2 * dim], 1)
    q_turned, k_turned = apply_partial(q[..., :turning], k[..., :turning], cos[None], sin[None])
    torch.testing.assert_close(result[:, 0], torch.cat([q_turned, q[..., turning:]], -1)[0, 0])
    torch.testing.assert_close(kv.view(8, 2, dim)[:tokens, 0], torch.cat([k_turned, k[..., turning:]], -1)[0, 0])


def test_norms_of_heads_come_before_the_rotation() -> None:
    tokens, heads, kv_heads, dim = 5, 4, 2, 16
    qkv, (cos, sin) = torch.randn(tokens, (heads + 2 * kv_heads) * dim), angles(tokens, dim)
    q_norm, k_norm = filled(Qwen3RMSNorm(dim), torch.float32), filled(Qwen3RMSNorm(dim), torch.float32)
    kv, slots = torch.zeros(2, 4, 2, kv_heads, dim), torch.arange(tokens)
    result = reference.roped(qkv, cos, sin, kv, slots, heads, (q_norm.weight, k_norm.weight), 1e-6)
    q, k, v = qkv.view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    turned = apply_rotary_pos_emb(
        q_norm(q).transpose(0, 1)[None], k_norm(k).transpose(0, 1)[None], cos[None], sin[None]
    )
    torch.testing.assert_close(result, turned[0][0].transpose(0, 1))
    torch.testing.assert_close(kv.view(8, 2, kv_heads, dim)[:tokens, 0], turned[1][0].transpose(0, 1))
    assert torch.equal(kv.view(8, 2, kv_heads, dim)[:tokens, 1], v)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    gate_up = torch.randn(5, 64) * 4
    expected = ACT2FN[activation](gate_up[:, :32]) * gate_up[:, 32:]
    torch.testing.assert_close(reference.gated(gate_up, activation), expected)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(LoadError, match="quick_gelu"):
        reference.gated(torch.zeros(1, 2), "quick_gelu")
    assert known("silu") == "silu"


def test_gated_layer_with_norm_and_residual() -> None:
    """Two calls are a Llama layer's second half."""
    config: Any = SimpleNamespace(hidden_size=32, intermediate_size=48, mlp_bias=True, hidden_act="silu")
    mlp, norm = filled(LlamaMLP(config), torch.float32), filled(LlamaRMSNorm(32), torch.float32)
    weight = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    bias = torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias])
    hidden = torch.randn(5, 32)
    expected = hidden + mlp(norm(hidden))
    inner = reference.linear(hidden, weight, bias, None, (norm.weight, norm.variance_epsilon), "silu")
    result = reference.linear(inner, mlp.down_proj.weight, mlp.down_proj.bias, hidden, None, None)
    assert result is hidden
    torch.testing.assert_close(hidden, expected)


def test_plain_product() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    assert torch.equal(reference.linear(x, weight, bias, None, None, None), F.linear(x, weight, bias))


def test_best_takes_the_lowest_of_equal_and_tells_nan() -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, 3, 3, 2], [-inf, -inf, -inf, -inf], [inf, nan, nan, 0]]).bfloat16()
    values, ids = reference.best(logits)
    torch.testing.assert_close(values, torch.tensor([3.0, -inf, nan]), equal_nan=True)
    assert ids.tolist() == [1, 0, 1]


def test_each_device_has_its_module() -> None:
    assert ops("cpu") is reference
    with pytest.raises(LoadError, match="'tpu'"):
        ops("tpu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_shapes_give_every_processor_work_and_waste_no_columns(tokens: int, gated: bool) -> None:
    for outputs in (576, 896, 1280, 2048, 3072, 4096, 6144, 8192, 14336, 18944, 128256):
        for width in (576, 896, 1536, 2048, 3072, 3584, 4096, 4864, 14336, 18944):
            chosen = shape(tokens, outputs, width, gated, 2)
            if tokens == 1:
                assert chosen is not None
            if chosen is None:
                continue
            assert -(-outputs // chosen.rows) * chosen.splits >= 0.7 * PROCESSORS
            assert width % chosen.columns == 0 or chosen.columns < 2 * width
            assert chosen.columns & -chosen.columns == chosen.columns
            assert chosen.columns * chosen.splits <= 2 * width
            assert tokens == 1 or chosen.rows >= 16, "tensor cores take sixteen rows"


def test_shapes_of_float32_and_of_many_tokens() -> None:
    assert shape(1, 4096, 4096, False, 4) is not None
    assert shape(2, 4096, 4096, False, 4) is None
    assert shape(17, 4096, 4096, False, 2) is None
    assert shape(1, 1, 64, True, 4) is not None


def test_columns_divide_the_width_or_cover_it() -> None:
    assert [even(width, 1024, 512) for width in (4096, 3584, 896, 576, 4864)] == [1024, 512, 1024, 1024, 1024]
    assert even(576, 256) == 256
    assert even(896, 256) == 128


def test_a_norm_is_inside_only_where_programs_are_large() -> None:
    assert Shape(64, 256, 4, 3).takes_norm
    assert not Shape(64, 128, 4, 4).takes_norm
    assert not Shape(64, 256, 4, 3, splits=4).takes_norm
