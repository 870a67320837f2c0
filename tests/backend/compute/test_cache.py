"""KVCache's books, and what probe() finds or refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backend.compute.attention.base import Rule
from backend.compute.attention.paged import register
from backend.compute.cache import FP8, KVCache, LayerSpec, Recorder, bytes_per_block, probe, rounded, write
from backend.errors import LoadError

torch.set_num_threads(1)
SPECS = [LayerSpec(2, 8), LayerSpec(3, 16, 5)]
TINY = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(family: str, **changes: Any) -> Any:
    register()
    config = AutoConfig.for_model(family, **{**TINY, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="paged", dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype: torch.dtype) -> None:
    cache = KVCache(SPECS, 7, 16, dtype, "cpu")
    assert cache.nbytes == 8 * bytes_per_block(SPECS, 16, dtype)  # seven blocks and scratch
    assert bytes_per_block(SPECS, 16, dtype) == 2 * 16 * (2 * 8 + 3 * 16) * dtype.itemsize


def test_slots_follow_the_block_table() -> None:
    cache = KVCache(SPECS, 9, 4, torch.float32, "cpu")
    tables = torch.tensor([[7, 2, 5], [0, 8, 1]], dtype=torch.int32)
    positions = torch.tensor([[0, 3, 4, 11], [1, 4, 7, 8]])
    assert cache.slots(tables, positions).tolist() == [[28, 31, 8, 23], [1, 32, 35, 4]]
    assert cache.scratch_slot == 36
    assert cache.tokens(0).shape == (40, 2, 2, 8)


def test_gather_gives_keys_and_values_apart() -> None:
    cache = KVCache(SPECS, 3, 4, torch.float32, "cpu")
    cache.tokens(1).copy_(torch.arange(16.0)[:, None, None, None].expand(16, 2, 3, 16))
    cache.tokens(1)[:, 1] += 100
    for slots in ([9, 2, 0, 15], [1, 14]):
        keys, values = cache.gather(1, torch.tensor(slots), 2)
        assert keys.shape == values.shape == (2, 3, len(slots) // 2, 16)
        assert keys[:, 2, :, 15].flatten().tolist() == slots
        assert values[:, 0, :, 0].flatten().tolist() == [slot + 100 for slot in slots]


def test_probe_finds_shapes_and_windows() -> None:
    assert probe(build("llama"), "cpu") == [LayerSpec(2, 8)] * 3
    gemma = build("gemma2", head_dim=16, sliding_window=6)
    assert [spec.window for spec in probe(gemma, "cpu")] == [6, 0, 6]


def test_probe_sees_shards_not_configuration() -> None:
    """A tensor-parallel rank may hold fewer heads than the configuration names."""
    model = build("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            linear = getattr(attention, name)
            linear.weight = torch.nn.Parameter(linear.weight[:rows])
        attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :16])
    assert probe(model, "cpu") == [LayerSpec(1, 8)] * 3


def test_probe_names_layers_outside_the_interface() -> None:
    with pytest.raises(LoadError, match=r"bloom: layers \[0, 1, 2\] do not use"):
        probe(build("bloom", n_layer=3, n_head=4), "cpu")


def test_probe_refuses_a_window_that_is_not_the_mask_s() -> None:
    model = build("mistral", sliding_window=4)
    model.model.layers[1].self_attn.config = build("mistral", sliding_window=None).config
    model.model.layers[1].self_attn.config._attn_implementation = "paged_probe"
    with pytest.raises(LoadError, match="layer 1 has a mask other than the whole context"):
        probe(model, "cpu")


def test_probe_refuses_unequal_head_sizes() -> None:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    with pytest.raises(LoadError, match="12, 12, 8"):
        probe(build("deepseek_v3", **latent, first_k_dense_replace=3, num_key_value_heads=4), "cpu")


def test_recorder() -> None:
    recorder = Recorder()
    query, key = torch.randn(6, 2, 8), torch.randn(3, 2, 8)
    assert recorder.attend(4, query, key, key, Rule(1.0, 7)).shape == (2, 6, 8)
    assert recorder.specs == {4: LayerSpec(3, 8, 7)}
    with pytest.raises(LoadError, match="layer 4 calls attention twice"):
        recorder.attend(4, query, key, key, Rule(1.0))
    with pytest.raises(LoadError, match="5 heads on 3"):
        recorder.attend(5, query[:5], key, key, Rule(1.0))


def test_a_cache_of_float8_saturates_and_gives_what_it_keeps() -> None:
    cache = KVCache(SPECS[:1], 3, 4, FP8, "cpu")
    heads, dim = SPECS[0].kv_heads, SPECS[0].head_dim
    key, value = torch.randn(2, heads, dim) * 3, torch.tensor([1e9, -1e9])[:, None, None].expand(2, heads, dim)
    write(cache.tokens(0), torch.tensor([5, 2]), rounded(key, FP8), rounded(value, FP8))
    keys, values = cache.gather(0, torch.tensor([5, 2]), 1)
    assert (keys[0].float().transpose(0, 1) - key).abs().max() < key.abs().max() / 16
    assert torch.equal(values[0].float().transpose(0, 1), value.clamp(-448, 448))
    assert cache.nbytes == 4 * bytes_per_block(SPECS[:1], 4, FP8) == 2 * bytes_per_block(SPECS[:1], 4, torch.float16)
