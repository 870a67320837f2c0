"""What is refused before anything starts, and how long texts may be."""

import json

import pytest

from backend.encoders import SHARDABLE_ENCODERS, check_task, longest
from backend.errors import LoadError
from backend.model_folder import Checkpoint


def checkpoint(folder, model_type="bert", tokenizer=None, **config):
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return Checkpoint(folder, {"model_type": model_type, **config}, {})


@pytest.mark.parametrize("family", sorted(SHARDABLE_ENCODERS))
def test_heads_are_shared_evenly(tmp_path, family):
    name = "n_heads" if family == "distilbert" else "num_attention_heads"
    check_task(checkpoint(tmp_path, family, **{name: 12}), 3)
    with pytest.raises(LoadError, match=f"{family} has 12 attention heads, which 5 ranks cannot share evenly"):
        check_task(checkpoint(tmp_path, family, **{name: 12}), 5)


@pytest.mark.parametrize(
    ("family", "words"),
    [("modernbert", "one projection"), ("mpnet", "heads of the whole model"), ("albert", "not been shown")],
)
def test_what_cannot_be_split_says_why(tmp_path, family, words):
    check_task(checkpoint(tmp_path, family, num_attention_heads=12), 1)
    with pytest.raises(LoadError, match=f"{family} cannot be split over 2 ranks: .*{words}.*; use tensor_parallel 1"):
        check_task(checkpoint(tmp_path, family, num_attention_heads=12), 2)


def test_what_is_not_supported_is_refused(tmp_path):
    with pytest.raises(LoadError, match="with a decoder"):
        check_task(checkpoint(tmp_path, is_encoder_decoder=True), 1)


@pytest.mark.parametrize(
    ("family", "config", "tokenizer", "expected"),
    [
        ("bert", {"max_position_embeddings": 512}, None, 512),
        ("bert", {"max_position_embeddings": 512}, {"model_max_length": 128}, 128),
        ("bert", {"max_position_embeddings": 512}, {"model_max_length": 10**30}, 512),
        ("bert", {"max_position_embeddings": 512}, {"model_max_length": 1e30}, 512),
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, None, 512),
        ("xlm-roberta", {"max_position_embeddings": 514}, {"model_max_length": 512}, 512),
        ("camembert", {"max_position_embeddings": 514}, None, 512),
        ("mpnet", {"max_position_embeddings": 514, "pad_token_id": 1}, None, 512),
        ("bert", {}, {"model_max_length": 77}, 77),
    ],
)
def test_the_longest_text(tmp_path, family, config, tokenizer, expected):
    assert longest(checkpoint(tmp_path, family, tokenizer, **config), 0) == expected


def test_asked_lengths(tmp_path):
    made = checkpoint(tmp_path, tokenizer={"model_max_length": 1000}, max_position_embeddings=512)
    assert longest(made, 100) == 100
    with pytest.raises(LoadError, match="max_model_len 513 is more than the model's 512 positions"):
        longest(made, 513)  # whatever the tokenizer says
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(LoadError, match="set max_model_len"):
        longest(checkpoint(tmp_path), 0)
    assert longest(checkpoint(tmp_path), 64) == 64
    with pytest.raises(LoadError, match="set max_model_len"):
        longest(checkpoint(tmp_path, max_position_embeddings=1 << 30), 0)  # as good as none
