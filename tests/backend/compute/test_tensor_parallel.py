"""The head split over the vocabulary, joined by hand; the group's room in shared memory. Real ranks: test_load.py."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backend.compute import tensor_parallel
from backend.compute.tensor_parallel import VocabParallelHead, connect
from backend.errors import LoadError


def heads(vocab: int, world: int, bias: bool, tied: bool) -> tuple[list[VocabParallelHead], nn.Parameter, torch.Tensor]:
    torch.manual_seed(vocab)
    embedding, biases = nn.Parameter(torch.randn(vocab, 6)), torch.randn(vocab)
    made = [VocabParallelHead(vocab, 6, bias, rank, world, torch.float32) for rank in range(world)]
    for head in made:
        head.to_empty(device="cpu")
        if tied:
            head.tie(embedding)
        else:
            head.weight.data.copy_(embedding.detach()[head.rows])
        if head.bias is not None:
            head.bias.data.copy_(biases[head.rows])
    return made, embedding, biases


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("vocab", "world"), [(12, 1), (12, 2), (12, 3), (13, 2), (13, 3), (13, 5), (5, 4), (4, 4)])
def test_joined_logits_are_the_whole_heads(
    vocab: int, world: int, bias: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, embedding, biases = heads(vocab, world, bias, tied)
    hidden = torch.randn(2, 3, 6)
    shards = torch.stack([nn.functional.linear(hidden, head.weight, head.bias) for head in ranks])
    monkeypatch.setattr(tensor_parallel, "all_gather", lambda shard, count: shards)
    want = nn.functional.linear(hidden, embedding, biases if bias else None)
    for head in ranks:
        torch.testing.assert_close(head(hidden), want)


def test_a_tied_head_takes_no_memory_and_the_others_equal_shares() -> None:
    ranks, embedding, _ = heads(13, 3, bias=False, tied=True)
    assert {head.weight.untyped_storage().data_ptr() for head in ranks} == {embedding.untyped_storage().data_ptr()}
    assert {head.weight.shape[0] for head in ranks} == {5}


def test_no_room_in_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    with pytest.raises(LoadError, match="64 MiB free; 2 ranks need 134 MiB"):
        tensor_parallel._check_room(2)


def test_one_rank_needs_no_group(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "as before")
    connect(0, 1, torch.device("cpu"), "nowhere")
    assert not torch.distributed.is_initialized()
