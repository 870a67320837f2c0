"""Who sums between ranks, and blocks of one rank of several. The kernel itself: tests/gpu/test_all_reduce.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from backend.compute import all_reduce, blocks
from backend.compute.all_reduce import NO_MULTICAST, SWITCH, Sums
from backend.compute.cache import KVCache, probe
from backend.compute.dense.base import ops
from backend.compute.load import load
from backend.config import EngineConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import families

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def logits(model: Any, specs: Any, ids: Tensor) -> Tensor:
    """Of one sequence in a step of its own."""
    step = blocks._trial_step(KVCache(specs, 2, ids.shape[1], torch.float32, "cpu"), ids.shape[1])
    with torch.inference_mode():
        found: Tensor = model(
            input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False, step=step
        ).logits
    return found


class Doubling(Sums):
    """Another rank has the same part as this one, once it is there."""

    factor = 1

    def total(self, part: Tensor) -> Tensor:
        return part.mul_(self.factor)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of one rank; no OpenAI Triton."""
    monkeypatch.setattr(dist, "all_reduce", lambda *given: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(all_reduce, "ops", lambda kind: ops("cpu"))
    monkeypatch.setattr(all_reduce, "agreed", lambda mine, device: mine)
    monkeypatch.delenv(SWITCH, raising=False)


@pytest.mark.parametrize("name", ["llama", "llama-bias", "gemma2", "mixtral"])
def test_blocks_of_one_rank_give_the_sums_of_all(
    name: str, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sums = families.write(name, tmp_path), Doubling(CPU)
    monkeypatch.setattr(blocks, "sums", lambda width, dtype, device: (sums, f"sums of {width}"))
    model = load(EngineConfig(model=str(folder), device="cpu"), 0, 1, CPU, torch.float32, merge=True)
    specs = probe(model, "cpu")
    report = blocks.install(model, specs, 2, torch.float32, CPU)
    assert "2 of 2 layers" in report and f"; sums of {model.config.hidden_size}" in report
    want = families.expected(folder)
    projections = [module for path, module in model.named_modules() if path.endswith(("o_proj", "mlp.down_proj"))]
    for projection in projections:
        projection.weight.data *= 0.5  # the other rank has the other half
    sums.factor = 2
    for tokens in (24, 7):
        found = logits(model, specs, families.inputs()[:1, :tokens])
        torch.testing.assert_close(found[0], want[0, :tokens], atol=2e-4, rtol=2e-4)
    sums.factor = -2  # norms do not undo that
    assert not torch.allclose(logits(model, specs, families.inputs()[:1, :7])[0], want[0, :7], atol=2e-4)


def told(device: torch.device = GPU) -> tuple[Sums, str]:
    return all_reduce.sums(8, torch.float32, device)


def test_on_cpu_nothing_is_tried(alone: None) -> None:
    assert told(CPU)[1] == ""


def test_the_switch(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    found, why = told()
    assert type(found) is Sums and f"{SWITCH} is 0" in why


def test_where_multicast_is_not_off_torch_maps_nothing(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import _symmetric_memory as symmetric

    monkeypatch.delenv(NO_MULTICAST, raising=False)
    monkeypatch.setattr(symmetric, "empty", lambda *sizes, **kinds: pytest.fail("allocated"))
    found, why = told()
    assert type(found) is Sums and f"{NO_MULTICAST} is not 1" in why


@pytest.mark.parametrize("at", [0, 1])
def test_what_another_rank_cannot_no_rank_does(at: int, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [True] * at + [False]
    monkeypatch.setattr(all_reduce, "agreed", lambda mine, device: mine and answers.pop(0))
    monkeypatch.setattr(all_reduce, "_inbox", lambda *given: torch.zeros(1))
    monkeypatch.setattr(all_reduce, "_mapped", lambda *given: ((torch.zeros(1),) * 2, None))
    monkeypatch.setattr(all_reduce, "OneShot", lambda *given: Doubling(CPU))
    found, why = told()
    assert type(found) is Sums and "another rank cannot" in why and not answers


@pytest.mark.parametrize(
    ("change", "serves"),
    [
        (lambda part: part, True),
        (lambda part: part * 1.01, False),
        (lambda part: torch.where(torch.arange(len(part))[:, None] < 130, part, -0.0), False),
        (lambda part: part * torch.nan, False),
    ],
    ids=["right", "off", "rows that never came", "no numbers"],
)
def test_only_what_sums_as_the_group_does_serves(
    change: Callable[[Tensor], Tensor], serves: bool, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Sums):
        patience = 0

        def total(self, part: Tensor) -> Tensor:
            return change(part)

    made = Made(CPU)
    monkeypatch.setattr(all_reduce, "connected", lambda *given: (made, ""))
    monkeypatch.setattr(torch.Tensor, "to", on_cpu(torch.Tensor.to))
    found, why = told()
    assert (found is made) == serves and ("differ" in why) == (not serves)
    assert made.patience == all_reduce._PATIENT


def on_cpu(usual: Any) -> Any:
    return lambda tensor, *given, **kinds: usual(tensor, *(each for each in given if each != GPU), **kinds)


def test_sums_that_differ_between_ranks_do_not_serve(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_rank(values: Tensor, op: Any = None) -> None:
        if op == dist.ReduceOp.MAX:
            values[0, 0] += 1e-6

    monkeypatch.setattr(dist, "all_reduce", other_rank)
    assert not all_reduce._same(torch.ones(2, 3))


def test_parts_have_room_by_the_bytes_that_are_sent() -> None:
    assert all_reduce.room(2, 2) * 2 == 32 << 20
    assert all_reduce.room(4, 2) * 2 * 3 <= 4 << 20 < all_reduce.room(4, 2) * 2 * 3.01
    assert all_reduce.room(8, 4) % 16 == 0
