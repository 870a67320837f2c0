"""Decoder under random schedules of split prompts and decodes against transformers' generate, family by family."""

from __future__ import annotations

import os
import random
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers

from backend.compute.decoder import decode, dtype_of, prefill
from backend.config import EngineConfig
from backend.errors import LoadError
from backend.generation.plan import Sampled
from backend.generation.sequence import SamplingParams
from backend.ranks.group import RankGroup

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))

import families  # noqa: E402
from decoding import local, play, sequence, settings  # noqa: E402

NEW, TIE = 12, 1e-4
"""Tokens to generate; two logits closer than TIE may change places with the order of additions."""
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=True)
NUM_BLOCKS = 40
"""Of 4 tokens: too few for all sequences at once, so that some are preempted."""

SHORT = {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES: dict[str, tuple[str, dict[str, Any], int]] = {
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 128),
    "longrope": ("phi3", {"rope_type": "longrope", **FACTORS, **SHORT}, 32),
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0, **SHORT}, 128),
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, 128),
}
"""Name -> family, rope_parameters, and the longest text that may be served."""
STATED = {"longrope": {"original_max_position_embeddings": 32}}  # Phi-3 has it beside rope_parameters, and prefers it

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A rank in this process sets variables for DeepSpeed."""
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


@dataclass
class Want:
    """What transformers makes of one prompt."""

    ids: list[int]
    logprobs: list[float]
    sure: int
    """Tokens before the first near tie."""


def prompts(longest: int = 60, count: int = 14, seed: int = 5) -> list[list[int]]:
    """Some share a beginning."""
    rng = random.Random(seed)
    stem = [rng.randrange(3, families.VOCAB) for _ in range(longest)]
    lengths = [1, 2, longest, *(rng.randint(1, longest) for _ in range(count - 3))]
    made = [[*stem[: length // 2], *(rng.randrange(3, families.VOCAB) for _ in range(length))] for length in lengths]
    return [ids[:length] for ids, length in zip(made, lengths, strict=True)]


def reference(folder: Path, given: list[list[int]]) -> list[Want]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = []
    for ids in given:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = model.eval().generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        logits = torch.stack(out.logits)[:, 0].float()  # [NEW, vocabulary]
        best = logits.topk(2).values
        ties = (best[:, 0] - best[:, 1] < TIE).nonzero()
        new = out.sequences[0, len(ids) :].tolist()
        values = logits.log_softmax(-1)[range(len(new)), new].tolist()
        found.append(Want(new, values, int(ties[0]) if len(ties) else len(new)))
    return found


def assert_equal(step: Any, config: EngineConfig, given: list[list[int]], want: list[Want]) -> None:
    """Play the prompts in three schedules; each must give the reference's tokens and log-probabilities."""
    preempted = 0
    for seed, depth in enumerate([0, 1, 2]):
        sequences = [sequence(ids, GREEDY) for ids in given]
        scheduler, logprobs = play(step, sequences, config, NUM_BLOCKS, seed, depth)
        preempted += scheduler.preemptions
        for seq, values, one in zip(sequences, logprobs, want, strict=True):
            assert seq.completion[: one.sure].tolist() == one.ids[: one.sure]
            assert values[: one.sure] == pytest.approx(one.logprobs[: one.sure], abs=2e-4)
    assert preempted > 0
    assert sum(one.sure == NEW for one in want) >= len(want) - 2


@pytest.mark.parametrize("name", [*families.FAMILIES, *families.REFUSED])
def test_any_schedule_gives_the_tokens_of_generate(name: str, folders: Any) -> None:
    given, config, rank = prompts(), settings(folders(name)), local()
    rank.open(config, NUM_BLOCKS)
    assert_equal(rank.step, config, given, reference(folders(name), given))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Two ranks that load one family after the other.

    One killed at its start has left torch's lock behind, and the first ninja on PATH is not the one to build with.
    """
    operator = Path(os.environ["TORCH_EXTENSIONS_DIR"], "deepspeed_shm_comm")
    operator.mkdir(parents=True, exist_ok=True)
    (operator / "lock").touch()
    other = tmp_path_factory.mktemp("other") / "ninja"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PATH", str(other.parent), prepend=os.pathsep)
        environment.setenv("TRITONSPEED_PYTHON", sys.executable)
        environment.setenv("PYTHONPATH", str(FAKES))
        group = RankGroup(
            EngineConfig(model=str(tmp_path_factory.mktemp("pair")), tensor_parallel=2),
            "decoding:Decoders",
            lambda line: None,
        )
        group.start()
    yield group
    group.close()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_two_ranks_give_the_tokens_of_generate(name: str, folders: Any, pair: RankGroup) -> None:
    given, config = prompts(), settings(folders(name), tensor_parallel=2)
    pair.call("open", config, NUM_BLOCKS)
    assert_equal(lambda plan: pair.call("step", plan)[0], config, given, reference(folders(name), given))


@pytest.fixture(scope="module")
def fused_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Two ranks whose layers are fused."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITONSPEED_PYTHON", sys.executable)
        environment.setenv("PYTHONPATH", str(FAKES))
        config = EngineConfig(model=str(tmp_path_factory.mktemp("pair")), tensor_parallel=2)
        group = RankGroup(config, "fused_decoding:FusedDecoders", lambda line: None)
        group.start()
    yield group
    group.close()


@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen3", "gemma2", "smollm3", "mixtral"])
def test_fused_layers_of_two_ranks_give_the_tokens_of_generate(name: str, folders: Any, fused_pair: RankGroup) -> None:
    given, config = prompts(), settings(folders(name), tensor_parallel=2)
    fused_pair.call("open", config, NUM_BLOCKS)
    assert fused_pair.call("blocks") == [1 if name == "smollm3" else 2] * 2
    assert_equal(lambda plan: fused_pair.call("step", plan)[0], config, given, reference(folders(name), given))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cache_of_float8_changes_little_and_alike_in_any_schedule(name: str, folders: Any) -> None:
    """A key that falls between two of its values may be rounded to either: hence a tolerance for schedules too."""
    given, rank = prompts(40, 8), local()
    found: dict[str, list[list[list[float]]]] = {}
    for kept in ("auto", "fp8"):
        config = settings(folders(name), kv_cache_dtype=kept)
        capacity = rank.open(config, NUM_BLOCKS)
        many = [play(rank.step, [sequence(ids, GREEDY) for ids in given], config, NUM_BLOCKS, 1)[1]]
        alone = [play(rank.step, [sequence(ids, GREEDY)], config, NUM_BLOCKS)[1][0] for ids in given]
        found[kept] = [*many, alone, [[capacity.num_blocks]]]
    (plain, _, [[few]]), (together, alone, [[blocks]]) = found["auto"], found["fp8"]
    assert blocks == pytest.approx(4 * few, rel=0.2)  # float32 here; memory is measured anew
    firsts = [[values[0] for values in each] for each in (plain, together, alone)]
    assert firsts[1] == pytest.approx(firsts[2], abs=0.02)
    assert firsts[1] == pytest.approx(firsts[0], abs=0.3) and firsts[1] != pytest.approx(firsts[0], abs=1e-4)


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rope_as_far_as_neighbours_cannot_change_it(name: str, tmp_path: Path) -> None:
    family, rope, longest = ROPES[name]
    kind, usual = (families.FAMILIES | families.REFUSED)[family]
    with patch.dict(families.FAMILIES, {name: (kind, usual | {"rope_parameters": rope} | STATED.get(name, {}))}):
        folder = families.write(name, tmp_path)
    rank, config = local(), settings(folder)
    capacity = rank.open(config, NUM_BLOCKS)
    assert capacity.max_model_len == longest
    given = prompts(min(60, longest - NEW), 8)
    want = reference(folder, given)
    for seed in range(2):
        sequences = [sequence(ids, GREEDY) for ids in given]
        play(rank.step, sequences, config, NUM_BLOCKS, seed)
        assert [seq.completion[: one.sure].tolist() for seq, one in zip(sequences, want, strict=True)] == [
            one.ids[: one.sure] for one in want
        ]


def test_what_cannot_be_served_is_refused_before_it_is_built(tmp_path: Path) -> None:
    kind, usual = families.FAMILIES["gemma3_text"]
    with patch.dict(families.FAMILIES, {"seeing": (kind, usual | {"use_bidirectional_attention": True})}):
        folder = families.write("seeing", tmp_path)
    with pytest.raises(LoadError, match="gemma3_text cannot be served: its attention sees later tokens"):
        local().open(settings(folder), NUM_BLOCKS)


@pytest.mark.parametrize("name", families.UNSERVABLE)
def test_families_outside_the_interface_are_refused(name: str, folders: Any) -> None:
    with pytest.raises(LoadError, match=f"{name} cannot be served: its"):
        local().open(settings(folders(name)), NUM_BLOCKS)


def test_broken_logits_answer_minus_one_and_harm_nobody(folders: Any) -> None:
    """The poisoned sequence leaves NaN in its blocks, which the others get afterwards."""
    rank, config = local(), settings(folders("llama"), block_size=2, max_sequences=3)
    rank.open(config, NUM_BLOCKS)
    clean = prompts(30)
    want = reference(folders("llama"), clean)
    used = {token for ids, one in zip(clean, want, strict=True) for token in [*ids, *one.ids]}
    poison = min(set(range(families.VOCAB)) - used)
    with torch.no_grad():
        rank.decoder._model.get_input_embeddings().weight[poison] = torch.nan
    sequences = [sequence(ids, GREEDY) for ids in [*clean[:5], [3, poison, 4], *clean[5:]]]
    play(rank.step, sequences, config, NUM_BLOCKS)
    broken = sequences.pop(5)
    assert set(broken.completion) == {-1}
    for seq, one in zip(sequences, want, strict=True):
        assert seq.completion[: one.sure].tolist() == one.ids[: one.sure]


def test_logprobs_come_only_where_asked_for(folders: Any) -> None:
    rank = local()
    rank.open(settings(folders("llama")), NUM_BLOCKS)
    answer = rank.step(decode(3))
    assert isinstance(answer, Sampled)
    assert answer.logprobs is None
    assert (answer.token_ids.dtype, answer.token_ids.shape) == (np.int32, (3,))


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 128),
        ({"max_sequences": 1}, 8),
        ({"max_sequences": 1, "step_tokens": 7, "block_size": 16}, 1),
        ({"step_tokens": 512}, 128),
        ({"max_sequences": 3, "step_tokens": 2}, 5),
    ],
)
def test_warm_up_fits_any_limits(changes: dict[str, Any], length: int, folders: Any) -> None:
    lines: list[str] = []
    rank, config = local(lines), settings(folders("opt"), max_model_len=length, **changes)
    rank.open(config, num_blocks=-(-length // config.block_size))
    lines.clear()
    rank.warm_up()
    decodes = [line for line in lines if line.startswith("warm-up")]
    last, count = decodes[-1], len(decodes)
    assert last.startswith(f"warm-up: decode of {config.max_sequences} sequences, {count} of {count}")


@pytest.mark.parametrize(
    ("tokens", "longest", "size", "sequences"),
    [(64, 64, 16, 8), (64, 20, 16, 8), (1, 100, 4, 1), (7, 3, 2, 2), (5, 1, 1, 9), (64, 8, 4, 1)],
)
def test_the_prefill_of_warm_up_is_a_sound_plan(tokens: int, longest: int, size: int, sequences: int) -> None:
    plan = prefill(tokens, longest, size, sequences)
    lengths = np.diff(plan.query_starts)
    assert int(lengths.sum()) == min(tokens, longest * sequences) and len(lengths) <= sequences
    assert int(lengths.sum()) == len(plan.input_ids) == len(plan.positions) == len(plan.kv_slots)
    assert lengths.max() <= longest and (lengths == plan.kv_lengths).all()
    assert plan.positions.max() == lengths.max() - 1
    assert plan.block_tables.shape[1] * size >= lengths.max()
    for chunk, length in enumerate(lengths):
        places = np.arange(length)
        slots = plan.block_tables[chunk, places // size].astype(np.int64) * size + places % size
        start = plan.query_starts[chunk]
        assert (plan.kv_slots[start : start + length] == slots).all()


def test_the_decode_of_warm_up_is_a_decode() -> None:
    plan = decode(5)
    costly = decode(5, costly=True).sampling
    assert plan.decode and plan.sampling.greedy and len(plan.slots) == 5
    assert costly.penalised and costly.logprobs and not costly.greedy


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "want"),
    [
        ("auto", "cpu", "bfloat16", torch.float32),
        ("auto", "cuda", "bfloat16", torch.bfloat16),
        ("auto", "cuda", "float16", torch.float16),
        ("bfloat16", "cpu", "float32", torch.bfloat16),
        ("float32", "cuda", "bfloat16", torch.float32),
    ],
)
def test_dtype_of(dtype: str, device: str, stored: str, want: torch.dtype) -> None:
    config = EngineConfig(model="m", dtype=dtype, device=device)
    assert dtype_of(config, SimpleNamespace(dtype=stored)) is want  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", ["int8", "float64", "float8_e4m3fn", "no such", "auto"])
def test_a_dtype_that_cannot_be_served(stored: str) -> None:
    with pytest.raises(LoadError, match=f"dtype {stored} cannot be served"):
        dtype_of(EngineConfig(model="m", device="cuda"), SimpleNamespace(dtype=stored))  # type: ignore[arg-type]


def test_capacity_counts_blocks_of_all_layers(folders: Any) -> None:
    rank, config = local(), settings(folders("llama"))
    with patch("psutil.virtual_memory", return_value=SimpleNamespace(available=1_000_000)):
        capacity = rank.open(config, NUM_BLOCKS)
    block = 2 * 2 * 4 * 3 * 8 * 4  # layers x (key, value) x tokens x heads x dim x bytes
    assert capacity.num_blocks == int(1_000_000 * config.kv_cache_fraction) // block
    assert (capacity.max_model_len, capacity.vocab_size) == (128, families.VOCAB)
    assert array("i", [capacity.num_blocks])[0] > 0
