"""paged() under transformers' models equals eager attention with transformers' own masks, however the text is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backend.compute.attention import masks
from backend.compute.attention.base import kernel
from backend.compute.attention.paged import paged, register
from backend.compute.attention.step import Step
from backend.compute.cache import FP8, KVCache, LayerSpec, probe
from backend.compute.decoder import decode
from backend.compute.graphs import Inputs
from backend.errors import LoadError
from backend.generation.plan import Plan

torch.set_num_threads(1)

BLOCK = 4
WINDOW = 9
SHAPE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
QWEN = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": dict(sliding_window=WINDOW),
    "qwen2": QWEN,
    "qwen3": dict(QWEN, head_dim=16),
    "gemma2": dict(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    "gemma3_text": dict(head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16, num_hidden_layers=6),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=48),
    "gpt_neox": {},
    "phi": {},
    "granite": dict(attention_multiplier=0.3),
    "smollm3": dict(no_rope_layer_interval=2),
    "mixtral": dict(EXPERTS, sliding_window=WINDOW),
    "qwen3_moe": dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "starcoder2": dict(sliding_window=WINDOW),
    "stablelm": dict(hidden_size=64),
    "nemotron": dict(partial_rotary_factor=0.5),
    "cohere": {},
    "cohere2": dict(sliding_window=WINDOW, head_dim=12),
    "gpt_oss": dict(EXPERTS, head_dim=16, sliding_window=WINDOW, rope_parameters=YARN),
    "olmo2": {},
    "phi3": dict(sliding_window=WINDOW),
    "gpt2": dict(n_embd=48, n_layer=4, n_head=4, n_positions=256, scale_attn_by_inverse_layer_idx=True),
}
"""Small random models of families that differ in what they ask of attention."""


def build(family: str, **changes: Any) -> Any:
    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="paged", dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
        elif parameter.ndim > 1:  # the default of 0.02 makes every score nearly 0, and every rule alike
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def plan(chunks: Sequence[tuple[Sequence[int], int]], counts: Sequence[int], tokens: Sequence[Sequence[int]]) -> Plan:
    """Chunks of (block numbers, tokens computed before) and how many tokens of each text come now."""
    positions = [np.arange(before, before + count) for (_, before), count in zip(chunks, counts, strict=True)]
    slots = [
        np.asarray(blocks)[at // BLOCK] * BLOCK + at % BLOCK for (blocks, _), at in zip(chunks, positions, strict=True)
    ]
    width = max(len(blocks) for blocks, _ in chunks)
    tables = np.zeros((len(chunks), width), np.int32)
    for row, (blocks, _) in enumerate(chunks):
        tables[row, : len(blocks)] = blocks
    ids = [
        token
        for (_, before), count, text in zip(chunks, counts, tokens, strict=True)
        for token in text[before : before + count]
    ]
    none: Any = None
    return Plan(
        input_ids=np.array(ids, np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        kv_slots=np.concatenate(slots).astype(np.int64),
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        kv_lengths=np.array([before + count for (_, before), count in zip(chunks, counts, strict=True)], np.int32),
        block_tables=tables,
        slots=np.arange(len(chunks), dtype=np.int32),
        rows=np.arange(len(chunks)),
        sampling=none,
    )


def forward(model: Any, made: Plan, cache: KVCache) -> torch.Tensor:
    step = Step.from_plan(made, "cpu", cache)
    ids, positions = torch.tensor(made.input_ids)[None].long(), torch.tensor(made.positions)[None].long()
    with torch.inference_mode():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, step=step).logits[0]
    return torch.as_tensor(logits)


def serve(model: Any, texts: list[list[int]], rng: random.Random, largest: int) -> list[torch.Tensor]:
    """Logits of every token, in steps that mix random chunks of up to `largest` tokens with single tokens."""
    blocks = rng.sample(range(200), 200)
    tables = [[blocks.pop() for _ in range(0, len(text), BLOCK)] for text in texts]
    cache = KVCache(probe(model, "cpu"), 200, BLOCK, torch.float32, "cpu")
    for layer in cache.layers:
        layer.fill_(torch.nan)  # an earlier owner's rubbish
    logits: list[list[torch.Tensor]] = [[] for _ in texts]
    done = [0] * len(texts)
    while rest := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        picked = rng.sample(rest, rng.randint(1, len(rest)))
        counts = [min(rng.choice([1, rng.randint(1, largest)]), len(texts[i]) - done[i]) for i in picked]
        made = plan([(tables[i], done[i]) for i in picked], counts, [texts[i] for i in picked])
        rows = forward(model, made, cache).split(counts)
        for i, count, row in zip(picked, counts, rows, strict=True):
            logits[i].append(row)
            done[i] += count
    return [torch.cat(rows) for rows in logits]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_eager(family: str) -> None:
    model = build(family)
    rng = random.Random(family)
    texts = [[rng.randrange(3, 97) for _ in range(length)] for length in (40, 1, 23, 2, 31)]
    served = [serve(model, texts, rng, largest) for largest in (64, 7, 1)]
    model.set_attn_implementation("eager")
    for i, text in enumerate(texts):
        ids = torch.tensor([text])
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        for run in served:
            torch.testing.assert_close(run[i], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss"])
def test_a_rule_left_out_would_be_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above has teeth: without window, cap or sinks the logits differ clearly."""
    from backend.compute.attention import paged as module
    from backend.compute.attention.base import Rule

    model = build(family)
    rng = random.Random(1)
    text = [rng.randrange(3, 97) for _ in range(40)]
    right = serve(model, [text], random.Random(0), 64)[0]
    lost = "window softcap sinks"
    monkeypatch.setattr(module, "Rule", lambda scaling, *rest: Rule(scaling))
    monkeypatch.setattr("backend.compute.cache.disagreement", lambda *_: None)
    wrong = serve(model, [text], random.Random(0), 64)[0]
    assert (right - wrong).abs().max() > 0.05 * right.abs().max(), lost


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("attention_mask", torch.zeros(1, 1, 2, 2)),
        ("dropout", 0.1),
        ("is_causal", False),
        ("position_bias", torch.zeros(1)),
        ("head_mask", torch.ones(4)),
        ("alibi", torch.zeros(4)),
        ("output_attentions", True),
        ("past_key_values", object()),
        ("something_new", 1),
    ],
)
def test_what_would_change_the_result_is_refused(argument: str, value: Any) -> None:
    module = torch.nn.Linear(1, 1)
    module.layer_idx = 0  # type: ignore[assignment]
    arguments: dict[str, Any] = {"attention_mask": None, "step": _NoStep(), argument: value}
    tensors = torch.zeros(3, 1, 2, 2, 8)
    with pytest.raises(LoadError, match=argument):
        paged(module, *tensors, **arguments)
    harmless = dict(position_ids=torch.zeros(1), use_cache=False, output_attentions=None, attention_mask=None)
    assert paged(module, *tensors, step=_NoStep(), **harmless)[0].shape == (1, 2, 2, 8)


class _NoStep:
    def attend(self, layer: int, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.zeros_like(query.transpose(0, 1))


def test_without_step_or_layer_index() -> None:
    tensors = torch.zeros(3, 1, 2, 2, 8)
    with pytest.raises(LoadError, match="not handed `step`"):
        paged(torch.nn.Linear(1, 1), *tensors, None)
    with pytest.raises(LoadError, match="no layer_idx"):
        paged(torch.nn.Linear(1, 1), *tensors, None, step=_NoStep())


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving costs no mask: transformers leaves it out for a name without a mask function."""
    from transformers import AttentionMaskInterface

    model = build("mistral")
    probe(model, "cpu")
    assert model.config._attn_implementation == "paged"
    assert "paged" not in AttentionMaskInterface()


def test_mask_disagreements_are_found() -> None:
    def mask(batch: Any, head: Any, row: Any, column: Any) -> Any:
        return (column <= row) & (column > row - 9)

    def chunked(batch: Any, head: Any, row: Any, column: Any) -> Any:
        return (column <= row) & (column // 64 == row // 64)

    def both_ways(batch: Any, head: Any, row: Any, column: Any) -> Any:
        return (column <= row) | (column < 2)

    assert masks.disagreement(None, 0, 9, mask) is None
    assert "whole context" in str(masks.disagreement(None, 0, 0, mask))
    assert "window of 8" in str(masks.disagreement(None, 3, 8, mask))
    assert "window of 10" in str(masks.disagreement(None, 3, 10, mask))
    assert masks.disagreement(None, 0, 0, chunked) and masks.disagreement(None, 0, 64, chunked)
    assert masks.disagreement(None, 0, 0, both_ways)


def test_padding_rows_of_a_static_step_are_harmless() -> None:
    torch.manual_seed(0)
    cache = KVCache([LayerSpec(2, 8)], 6, BLOCK, torch.float32, "cpu")
    cache.layers[0].normal_()
    made = plan([([3, 1], 5), ([2], 1)], [1, 1], [[0] * 6, [0] * 2])
    query, key, value = torch.randn(4, 2, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    from backend.compute.attention.base import Rule

    before = cache.layers[0].clone()
    expected = Step.from_plan(made, "cpu", cache).attend(0, query, key, value, Rule(0.3))
    after = cache.layers[0].clone()
    cache.layers[0].copy_(before)
    inputs = Inputs(cache, 4, 3, spare_slot=9)
    tables = made.block_tables
    inputs.fill(replace(decode(2), kv_slots=made.kv_slots, kv_lengths=made.kv_lengths, block_tables=tables))
    static = inputs.step
    assert static.kv_slots.tolist()[2:] == [24, 24] and static.kv_lengths.tolist() == [6, 2, 0, 0]
    padded = [torch.cat([x, torch.full_like(x, torch.nan)], 1) for x in (query, key, value)]
    on_host = Step(cache, static.kv_slots, static.query_starts, static.kv_lengths, static.block_tables, True,
                   np.arange(5, dtype=np.int32), np.array([6, 2, 0, 0], np.int32), kernel("cpu"))  # fmt: skip
    result = on_host.attend(0, *padded, Rule(0.3))
    torch.testing.assert_close(result[:2], expected)
    torch.testing.assert_close(cache.layers[0][:6], after[:6])


@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=str)
@pytest.mark.parametrize("window", [0, 3])
def test_reading_alone_equals_attending(window: int, dtype: torch.dtype) -> None:
    """A whole prompt, a continued one and a single token, whose keys and values are in the cache already."""
    torch.manual_seed(0)
    cache = KVCache([LayerSpec(2, 8)], 8, BLOCK, dtype, "cpu")
    cache.layers[0].copy_(torch.full(cache.layers[0].shape, torch.nan))
    query, key, value = torch.randn(4, 14, 8), torch.randn(2, 14, 8), torch.randn(2, 14, 8)
    from backend.compute.attention.base import Rule

    rule = Rule(0.3, window)
    tables = [([3, 1], 0), ([2, 5], 0), ([7], 0)]
    whole = Step.from_plan(plan(tables, [6, 7, 1], [[0] * 7] * 3), "cpu", cache)
    expected = whole.attend(0, query, key, value, rule)
    torch.testing.assert_close(whole.read(0, query.transpose(0, 1), rule), expected)
    rest = Step.from_plan(plan([([3, 1], 2), ([2, 5], 6), ([7], 0)], [4, 1, 1], [[0] * 7] * 3), "cpu", cache)
    rows = [2, 3, 4, 5, 12, 13]
    torch.testing.assert_close(rest.read(0, query.transpose(0, 1)[rows], rule), expected[rows])


def test_unknown_device() -> None:
    with pytest.raises(LoadError, match="'xpu'"):
        kernel("xpu")
