"""A decode step's inputs in one piece of memory, and a Decoder that takes its steps from there, uncaptured on CPU."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from backend.compute import decoder as decoders
from backend.compute import prompt_graphs
from backend.compute.cache import KVCache, LayerSpec
from backend.compute.decoder import decode, prefill
from backend.compute.graphs import Inputs, sizes
from backend.config import EngineConfig
from backend.generation.plan import LAST_TOKEN
from backend.generation.sequence import SamplingParams
from backend.ranks.rank import Birth

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import families
from decoding import local, play, sequence, settings
from fused_decoding import FusedDecoders, Uncaptured, UncapturedPrompt

BIRTH = Birth("", EngineConfig(model=""), 0, 1, "", 0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    torch.set_num_threads(1)
    with patch.dict(os.environ):
        yield


def test_sizes_end_with_the_most() -> None:
    assert sizes(1) == [1] and sizes(6) == [1, 2, 4, 6] and sizes(64)[-2:] == [56, 64]
    assert all(later <= 2 * earlier for earlier, later in zip(sizes(300)[2:], sizes(300)[3:], strict=False))


def test_a_plan_is_laid_out_and_the_rest_is_padding() -> None:
    cache = KVCache([LayerSpec(1, 8)], 6, 4, torch.float32, "cpu")
    inputs = Inputs(cache, 4, 3, 9)
    nothing = [24] * 4, [9] * 4, [0] * 4
    assert (inputs.step.kv_slots.tolist(), inputs.slots.tolist(), inputs.step.kv_lengths.tolist()) == nothing
    plan = replace(
        decode(2),
        input_ids=np.array([LAST_TOKEN, 5], np.int32),
        positions=np.array([5, 1], np.int32),
        kv_slots=np.array([13, 1], np.int64),
        kv_lengths=np.array([6, 2], np.int32),
        block_tables=np.array([[2, 3], [0, 0]], np.int32),
        slots=np.array([1, 0], np.int32),
    )
    inputs.fill(plan)
    assert inputs.ids.tolist() == [LAST_TOKEN, 5, 0, 0] and inputs.positions.tolist() == [5, 1, 0, 0]
    assert inputs.step.kv_slots.tolist() == [13, 1, 24, 24] and inputs.slots.tolist() == [1, 0, 9, 9]
    assert inputs.step.kv_lengths.tolist() == [6, 2, 0, 0]
    assert inputs.step.block_tables[:2, :2].tolist() == [[2, 3], [0, 0]]
    inputs.fill(decode(1))
    assert inputs.step.kv_slots.tolist() == [0, 24, 24, 24] and inputs.step.kv_lengths.tolist() == [1, 0, 0, 0]


def test_prompts_are_computed_by_the_next_size() -> None:
    captured = prompt_graphs.sizes(2048)
    assert captured[:2] == [64, 128] and captured[-2:] == [1024, 2048]
    assert prompt_graphs.sizes(100) == [64, 100] and prompt_graphs.sizes(30) == [30]
    asked = (1, 64, 65, 1024, 1025, 1984, 1985, 2048, 2049)
    assert [prompt_graphs.covering(captured, tokens) for tokens in asked] == [64, 64, 128, 1024, 0, 0, 2048, 2048, 0]


def test_a_size_that_takes_longer_than_a_larger_one_is_computed_by_that() -> None:
    seconds = {1024: 9.0, 512: 4.0, 448: 6.0, 384: 3.9, 320: 4.0, 256: 5.0, 64: 2.0}
    found = prompt_graphs.soonest(seconds)
    assert found == {1024: 1024, 512: 512, 448: 512, 384: 384, 320: 320, 256: 384, 64: 64}  # 320: no more than noise


def test_inputs_of_prompts_are_padded() -> None:
    cache = KVCache([LayerSpec(1, 8, 0)], 6, 4, torch.float32, torch.device("cpu"))
    inputs = prompt_graphs.Inputs(cache, 8, 3, 9)
    plan = replace(prefill(5, 3, 4, 4), slots=np.array([2, 7], np.int32), rows=np.array([1]))
    for _ in range(2):  # what a longer step left is gone
        inputs.fill(prefill(8, 8, 4, 4))
        inputs.fill(plan)
        assert inputs.kv_slots.tolist() == [0, 1, 2, 0, 1, 24, 24, 24] == [*plan.kv_slots, 24, 24, 24]
        assert inputs.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0] and inputs.ids.tolist() == [0] * 8
        assert inputs.slots.tolist() == [2, 2, 2, 7, 7, 9, 9, 9] and inputs.ends.tolist() == [4, 0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("llama", tmp_path_factory.mktemp("models") / "llama")


def tokens(folder: Path, graphs: bool, depth: int, fused: bool) -> list[list[int]]:
    """Of greedy and of drawn sequences that come and go."""
    rank, config = FusedDecoders(BIRTH, print) if fused else local(), settings(folder)
    rank.open(config, 60)
    decoder: Any = rank.decoder
    if graphs:
        with patch.object(decoders, "DecodeGraph", Uncaptured):
            decoder._graphs = {size: decoder._capture(size) for size in sizes(config.max_sequences)}
        with patch.object(decoders, "PromptGraph", UncapturedPrompt), patch.multiple(prompt_graphs, FINE=24, DENSE=8):
            decoder._capture_prompts()
        assert decoder._prompts[16] is decoder._prompts[24] is not decoder._prompts[8]
    rng = random.Random(3)
    made = [
        sequence(
            [rng.randrange(3, families.VOCAB) for _ in range(rng.randint(1, 30))],
            SamplingParams(max_tokens=10, temperature=temperature, seed=index, repetition_penalty=penalty),
        )
        for index, (temperature, penalty) in enumerate([(0.0, 1.0)] * 5 + [(0.8, 1.0), (0.0, 1.3)] + [(0.0, 1.0)] * 4)
    ]
    play(decoder.step, made, config, 60, seed=depth, depth=depth)
    return [list(seq.completion) for seq in made]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_same_tokens_from_whole_steps(folder: Path, depth: int, fused: bool) -> None:
    before, prompts = Uncaptured.replays, UncapturedPrompt.replays
    assert tokens(folder, True, depth, fused) == tokens(folder, False, depth, fused)
    assert Uncaptured.replays > before and UncapturedPrompt.replays > prompts + 3


def test_rows_that_are_not_numbers_are_broken(folder: Path) -> None:
    rank, config = local(), settings(folder)
    rank.open(config, 20)
    decoder: Any = rank.decoder
    with patch.object(decoders, "DecodeGraph", Uncaptured):
        decoder._graphs = {2: decoder._capture(2)}
    decoder._model.lm_head.weight[7] = torch.nan
    assert decoder.step(decode(2)).token_ids.tolist() == [-1, -1]


def test_prompts_that_cannot_be_captured_are_computed_without(folder: Path) -> None:
    lines: list[str] = []
    rank, config = local(lines), settings(folder)
    rank.open(config, 20)
    decoder: Any = rank.decoder
    made: list[int] = []

    def refused(forward: Any, inputs: prompt_graphs.Inputs, *given: Any) -> object:
        made.append(len(inputs.ids))
        if len(made) == 2:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return object()

    with patch.object(decoders, "PromptGraph", refused), patch.multiple(prompt_graphs, FINE=24, DENSE=8):
        decoder._capture_prompts()
    assert made == [64, 24] and not decoder._prompts
    assert lines[-1] == "warm-up: prompts without graphs: operation not permitted when stream is capturing"
    assert decoder.step(prefill(5, 5, 4, 4)).token_ids.shape == (1,)


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_capture_prompts_alike(folder: Path, fails: bool) -> None:
    """What one of them cannot capture none does, and each size is the slowest rank's."""
    lines: list[str] = []
    rank, config = local(lines), settings(folder)
    rank.open(config, 20)
    decoder: Any = rank.decoder

    def all_reduce(mine: torch.Tensor, op: Any) -> None:
        if op == torch.distributed.ReduceOp.MIN:  # whether all could
            mine.fill_(min(int(mine), int(not fails)))
        else:
            assert op == torch.distributed.ReduceOp.MAX
            mine.copy_(mine.maximum(torch.tensor([64.0, 90.0, 16.0, 8.0])))  # of 64, 24, 16 and 8 tokens

    with (
        patch.object(decoders, "PromptGraph", UncapturedPrompt),
        patch.multiple(prompt_graphs, FINE=24, DENSE=8),
        patch.object(decoder, "_world", 2),
        patch.object(torch.distributed, "all_reduce", all_reduce),
    ):
        decoder._capture_prompts()
    if fails:
        assert not decoder._prompts
        assert lines[-1] == "warm-up: prompts without graphs: another rank cannot capture them"
    else:
        assert decoder._prompts[24] is decoder._prompts[64] is not decoder._prompts[16]
        assert lines[-1].startswith("warm-up: prompts of up to 64 tokens in ")
