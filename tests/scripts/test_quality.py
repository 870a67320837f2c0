"""What quantization costs the sample model: a small form of scripts/bench_quality."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from measuring import quality

BARS = {"int8": 0.01, "int4": 0.05, "fp8": 0.06}
"""Of the perplexity over 500 tokens, where chance counts for more than over the bench's text."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def full(smollm2):
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(quality.text(20_000)[9_000:12_000], return_tensors="pt").input_ids[0][:501]
    model = quality.generator(smollm2, "", CPU, torch.float32)
    return tokenizer, ids, quality.perplexity(model, ids), quality.greedy(model, tokenizer, 4, 12)


@pytest.mark.parametrize("form", BARS)
def test_perplexity_and_greedy_text(form, smollm2, full):
    tokenizer, ids, usual, texts = full
    model = quality.generator(smollm2, form, CPU, torch.float32)
    found = quality.perplexity(model, ids)
    assert found != usual
    assert abs(found / usual - 1) < BARS[form]
    if form == "int8":
        _, agreed = quality.same(texts, quality.greedy(model, tokenizer, 4, 12))
        assert agreed > 0.6 * sum(map(len, texts))


def test_sentence_vectors_of_int8_keep_their_direction(capsys):
    quality.run(argparse.Namespace(
        model=None, embed_model=None, forms="int8", parts="embed", device="cpu", dtype="float32", bytes=0, threads=1
    ))  # fmt: skip
    cosine = float(capsys.readouterr().out.split("cosine ")[1].split()[0])
    assert 0.999 <= cosine < 1


def test_texts_are_compared_up_to_their_first_difference():
    assert quality.same([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5]]) == (1, 3)
