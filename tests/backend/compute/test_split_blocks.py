"""Attentions and MLPs of denoisers split among two ranks, against the same ones whole; and what has to stay whole."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import FeedForward as Plain
from diffusers.models.attention_processor import Attention as PlainAttention
from diffusers.models.attention_processor import AttnAddedKVProcessor

from backend.compute.images.split_blocks import KINDS, PROCESSORS, Attention, FeedForward, split_blocks
from backend.errors import LoadError

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from split_blocks import compute, modules, split_and_computed, wrongly_split


@pytest.fixture(scope="module")
def answers():
    torch.set_num_threads(1)
    return split_and_computed(2)


@pytest.mark.parametrize("name", modules())
def test_two_ranks_compute_what_the_whole_module_does(answers, name):
    expected = compute(*modules()[name])
    for rank in answers:
        found, share, said = rank[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert share < 0.6, "nothing was split"
        assert said == ["1 of 1 attentions and MLPs of the denoiser are split among 2 ranks"]


def test_every_kind_and_processor_of_the_tables_is_tried():
    tried = [module for module, _ in modules().values()]
    assert {type(module).__name__ for module in tried} == set(KINDS)
    assert {type(module.processor).__name__ for module in tried if hasattr(module, "processor")} == set(PROCESSORS)


def test_what_would_answer_otherwise_stays_whole():
    """Gates cut like any other projection are a rank's gates for another's values: the trial sees it."""
    expected = compute(*modules()["geglu"])
    for found, (said,) in wrongly_split(2):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert said.startswith("1 of 2 attentions"), said
        assert said.endswith("; 1 whole on every rank: split, it would answer otherwise")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Attention(PlainAttention(24, heads=3, dim_head=8)), "2 ranks cannot share its 3 attention heads"),
        (
            Attention(PlainAttention(32, heads=4, dim_head=8, kv_heads=4, qk_norm="rms_norm_across_heads")),
            "a norm spans all its heads",
        ),
        (Attention(PlainAttention(32, heads=4, kv_heads=2, dim_head=8)), "do not have the same heads"),
        (
            Attention(
                PlainAttention(
                    32, heads=4, dim_head=8, added_kv_proj_dim=16, norm_num_groups=4, processor=AttnAddedKVProcessor()
                )
            ),
            "no test shows that a split AttnAddedKVProcessor equals a whole one",
        ),
        (FeedForward(Plain(10, inner_dim=15)), "2 ranks cannot share its 15 inner values"),
    ],
)
def test_why_a_module_cannot_be_split(part, reason):
    assert reason in part.reason(2)


def test_a_denoiser_of_which_nothing_can_be_split_is_refused():
    odd = torch.nn.ModuleList([PlainAttention(24, heads=3, dim_head=8), PlainAttention(24, heads=3, dim_head=8)])
    with pytest.raises(LoadError, match=r"split_denoiser: .*2 ranks; 2 whole on every rank: .*3 attention heads"):
        split_blocks(odd, 2, torch.device("cpu"), print)
