"""Every family on one, two and three CPU ranks against plain transformers, and everything that must be refused."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))

import families  # noqa: E402
import shared_memory  # noqa: E402
from shards import Case, Result, start  # noqa: E402

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
THREE = ("llama", "llama-tied", "qwen3", "gemma2", "opt", "smollm3", "mixtral")
"""Families with three key/value heads or more that are also split in three."""

SEEN = {"olmo2": "q_norm spans all heads", "gpt2": "cannot split gpt2", "falcon": "columns, which nothing"}
"""What the loader sees for itself when the table of families is passed over."""

LARGE = {"hidden_size": 720, "intermediate_size": 2880, "num_hidden_layers": 6, "head_dim": 80}
"""Of llama: 183 MB, the largest tensor 8 MB."""

SAMPLE_TOKENS = torch.arange(100, 164)[None]

pytestmark = pytest.mark.slow

Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORM = "model.norm.weight"


def without(*names: str) -> Edit:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


def added(name: str, value: torch.Tensor) -> Edit:
    return lambda tensors: tensors | {name: value}


EQUAL: dict[str, tuple[str, Edit]] = {
    "head equal to its tied embedding": ("llama-tied", lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()}),
    "head unlike its tied embedding": ("llama-tied", lambda tensors: tensors | {HEAD: tensors[EMBEDDING] * 2}),
    "tied, under the head's name": (
        "llama-tied",
        lambda tensors: {HEAD if name == EMBEDDING else name: value for name, value in tensors.items()},
    ),
    "saved from the base model": (
        "llama-tied",
        lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()},
    ),
    "old buffers": ("llama", added("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))),
    "stored in bf16": ("qwen2", lambda tensors: {name: value.bfloat16() for name, value in tensors.items()}),
}
"""Checkpoints that transformers reads: ours must equal it."""

BROKEN: dict[str, tuple[Edit, str]] = {
    "tensor missing": (without(NORM), f"no tensor for {NORM}"),
    "bias left over": (added("model.layers.0.self_attn.q_proj.bias", torch.ones(72)), "self_attn.q_proj.bias' of the"),
    "tensor unknown": (added("model.extra", torch.ones(3)), "'model.extra'"),
    "wrong rows": (changed(NORM, lambda norm: norm[:-1]), NORM),
    "wrong columns": (changed("model.layers.1.mlp.up_proj.weight", lambda up: up[:, :-1]), "mlp.up_proj.weight"),
    "too many rows": (
        changed("model.layers.1.mlp.up_proj.weight", lambda up: torch.cat([up, up])),
        "mlp.up_proj.weight",
    ),
    "quantised": (changed(NORM, lambda norm: norm.to(torch.int8)), NORM),
}


@pytest.fixture(scope="module", autouse=True)
def extensions() -> None:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("models")
    names = [*families.FAMILIES, *families.REFUSED, *families.UNSERVABLE]
    made = {name: families.write(name, base / name) for name in names}
    made["several files"] = families.write("llama", base / "several", max_shard_size="60KB")
    for name, (family, edit) in EQUAL.items():
        made[name] = _edited(family, base / name, edit)
    for name, (edit, _) in BROKEN.items():
        made[name] = _edited("llama", base / name, edit)
    return made


def _edited(family: str, folder: Path, edit: Edit) -> Path:
    families.write(family, folder)
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def results(folders: dict[str, Path]) -> dict[tuple[str, int], list[Result]]:
    """By name and number of ranks: what each rank got."""
    wanted: dict[int, list[str]] = {1: list(folders), 2: list(folders), 3: list(THREE)}
    found: dict[tuple[str, int], list[Result]] = {}
    for world, names in wanted.items():
        by_rank = start(world, [Case(folders[name]) for name in names]).results()
        found |= {(name, world): [rank[index] for rank in by_rank] for index, name in enumerate(names)}
    return found


Results = dict[tuple[str, int], list[Result]]


def assert_equal(ranks: list[Result], want: torch.Tensor, tolerance: float = 1e-5) -> None:
    for rank in ranks:
        assert rank.error == ""
        assert rank.logits is not None
        torch.testing.assert_close(rank.logits, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", [*families.FAMILIES, "several files", *EQUAL])
def test_logits_equal_those_of_transformers(name: str, world: int, folders: dict[str, Path], results: Results) -> None:
    assert_equal(results[name, world], families.expected(folders[name]))


@pytest.mark.parametrize("name", THREE)
def test_three_ranks(name: str, folders: dict[str, Path], results: Results) -> None:
    assert_equal(results[name, 3], families.expected(folders[name]))


@pytest.mark.parametrize("name", list(families.REFUSED))
def test_what_cannot_be_split_is_right_alone_and_refused_on_two(
    name: str, folders: dict[str, Path], results: Results
) -> None:
    assert_equal(results[name, 1], families.expected(folders[name]))
    for rank in results[name, 2]:
        assert f"{name} cannot be split over 2 ranks" in rank.error


@pytest.mark.parametrize("name", list(families.UNSERVABLE))
@pytest.mark.parametrize("world", [1, 2])
def test_attention_outside_the_interface_is_refused(name: str, world: int, results: Results) -> None:
    for rank in results[name, world]:
        assert f"{name} cannot be served" in rank.error


@pytest.mark.parametrize("name", list(BROKEN))
@pytest.mark.parametrize("world", [1, 2])
def test_a_broken_checkpoint_is_refused_by_name(name: str, world: int, results: Results) -> None:
    for rank in results[name, world]:
        assert BROKEN[name][1] in rank.error
        assert "\n" not in rank.error


def test_ties(results: Results) -> None:
    for world in (1, 2, 3):
        assert all(rank.facts["tied"] for rank in results["llama-tied", world])
        assert not any(rank.facts["tied"] for rank in results["llama", world])
    assert not results["head unlike its tied embedding", 2][0].facts["tied"]
    assert results["tied, under the head's name", 2][0].facts["tied"]


def test_siblings_are_merged_and_keep_their_names(results: Results) -> None:
    for name, parts in {"llama": 10, "opt": 6, "gpt_neox": 0, "gemma2": 10}.items():
        for world in (1, 2):
            assert results[name, world][0].facts["merged"] == parts
    assert "model.layers.1.self_attn.k_proj.weight" in results["llama", 2][0].facts["names"]


def test_progress_rises_to_one_and_the_model_is_for_inference(results: Results) -> None:
    for rank in results["several files", 2]:
        assert rank.shares == sorted(rank.shares)
        assert rank.shares[-1] == 1.0
        assert len(rank.shares) > 10
        assert not rank.facts["training"]


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Result]]]:
    """What the ranks of two groups got that ran on one machine at the same time."""
    base = tmp_path_factory.mktemp("more")
    one_head = _variant("llama", base / "one head", num_key_value_heads=1)
    large = _variant("llama", base / "large", max_shard_size="60MB", **LARGE)
    left = {name: Case(folders[name], unguarded=True) for name in SEEN} | {"one head": Case(one_head)}
    left |= {"opt": Case(folders["opt"]), "paged": Case(folders["llama"], attention="paged")}
    right = {"llama": Case(folders["llama"]), "large": Case(large, measure=True)}
    right |= {f"{name} in bf16": Case(folders[name], torch.bfloat16, None) for name in ("llama", "gemma2")}
    if SAMPLE.is_dir():
        right["sample"] = Case(SAMPLE, inputs=SAMPLE_TOKENS)
    groups = [(list(cases), start(2, list(cases.values()))) for cases in (left, right)]
    found: dict[str, list[Result]] = {}
    for names, group in groups:
        found |= dict(zip(names, map(list, zip(*group.results(), strict=True)), strict=True))
    yield found
    shutil.rmtree(large)


def _variant(family: str, folder: Path, max_shard_size: str = "5GB", **settings: Any) -> Path:
    kind, usual = families.FAMILIES[family]
    with patch.dict(families.FAMILIES, {folder.name: (kind, usual | settings)}):
        return families.write(folder.name, folder, max_shard_size=max_shard_size)


def test_two_groups_at_once_do_not_mix_and_leave_nothing(
    pair: dict[str, list[Result]], folders: dict[str, Path]
) -> None:
    for name in ("llama", "opt"):
        assert_equal(pair[name], families.expected(folders[name]))
    assert shared_memory.forgotten(f"deepspeed_allreduce_buffer_{os.getuid()}_tritonspeed-") == []


@pytest.mark.parametrize("name", list(SEEN))
def test_the_structure_alone_shows_what_cannot_be_split(name: str, pair: dict[str, list[Result]]) -> None:
    for rank in pair[name]:
        assert SEEN[name] in rank.error


def test_more_ranks_than_heads_is_refused_on_every_rank(pair: dict[str, list[Result]]) -> None:
    for rank in pair["one head"]:
        assert "tensor_parallel 2 is more than the model's 1 key/value heads" in rank.error


def test_paged_attention_is_registered_by_the_loader(pair: dict[str, list[Result]]) -> None:
    for rank in pair["paged"]:
        assert rank.error == ""
        assert rank.facts["attention"] == "paged"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_half_precision(name: str, pair: dict[str, list[Result]], folders: dict[str, Path]) -> None:
    want = families.expected(folders[name], torch.bfloat16).float()
    for rank in pair[f"{name} in bf16"]:
        assert rank.facts["dtypes"] == {"torch.bfloat16"}
        assert rank.facts["merged"] == 10  # where it pays
        assert rank.logits is not None
        assert float((rank.logits.float() - want).abs().mean()) < 0.02 * float(want.std())


def test_memory_grows_by_the_shard_and_little_more(pair: dict[str, list[Result]]) -> None:
    for rank in pair["large"]:
        stored, held, peak = 183e6, rank.facts["bytes"], rank.facts["peak"]
        assert held < 0.7 * stored
        assert peak < held + 40e6


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample model is not there: scripts/serve fetches it")
def test_a_real_model(pair: dict[str, list[Result]]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        want = model.eval()(SAMPLE_TOKENS, use_cache=False).logits
    assert model.config.num_key_value_heads == 3  # uneven on two ranks
    assert_equal(pair["sample"], want, 2e-4)
