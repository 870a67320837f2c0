"""fill_mask against transformers' fill-mask pipeline on tiny random models."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_encoders
from serving_tasks import served

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.tasks.fill_mask import FillMask

AUTO = "AutoModelForMaskedLM"
TEXTS = ["I loved the {} movie.", "{}", "Über naïve {} in 東京 🙂, isn't it?", "the quick brown fox {}"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def case(request, tmp_path_factory):
    """How to ask the service, the pipeline, and texts with the model's mask."""
    folder = tiny_encoders.write(tmp_path_factory.mktemp(request.param), request.param, AUTO)
    pipe = transformers.pipeline("fill-mask", model=str(folder), device="cpu")
    with served("fill_mask", folder) as ask:
        yield ask, pipe, [text.format(pipe.tokenizer.mask_token) for text in TEXTS]


def check(found, at, wanted):
    count = len(wanted)
    assert found["token"][at, :count].tolist() == [entry["token"] for entry in wanted]
    assert [text.decode() for text in found["token_str"][at, :count]] == [entry["token_str"] for entry in wanted]
    assert [text.decode() for text in found["sequence"][at, :count]] == [entry["sequence"] for entry in wanted]
    np.testing.assert_allclose(found["score"][at, :count], [entry["score"] for entry in wanted], atol=1e-5)


def test_equals_the_pipeline_whatever_the_neighbours(case):
    ask, pipe, texts = case
    found = ask(*({"text": text.encode()} for text in texts))
    for at, text in enumerate(texts):
        check(found, at, pipe(text))


def test_top_k_differs_by_row_and_is_filled(case):
    ask, pipe, texts = case
    found = ask({"text": texts[0].encode(), "top_k": 1}, {"text": texts[2].encode(), "top_k": 40})
    check(found, 0, pipe(texts[0], top_k=1))
    check(found, 1, pipe(texts[2], top_k=40))
    assert found["token"][0, 1:].tolist() == [-1] * 39 and set(found["sequence"][0, 1:]) == {b""}


def test_padding_and_special_tokens_in_the_text(case):
    ask, pipe, texts = case
    text = f"{pipe.tokenizer.pad_token} {texts[0]} {pipe.tokenizer.sep_token} good"
    check(ask({"text": text.encode()}), 0, pipe(text))


def test_bad_rows_fail_alone(case):
    ask, pipe, texts = case
    mask = pipe.tokenizer.mask_token
    long = f"{'a, ' * 90}{mask}".encode()
    requests = [{"text": b"good"}, {"text": f"{mask} {mask}".encode()}, {"text": long, "truncate": True}]
    requests += [{"text": long}, {}, {"text": mask.encode(), "top_k": 0}]
    good, *bad = ask.together([{"text": texts[0].encode()}], *([row] for row in requests))
    check(good, 0, pipe(texts[0]))
    assert all(isinstance(error, InvalidInput) for error in bad)
    named = [f"no mask token: write {mask}", "2 mask tokens", "behind the 64", "takes 64", "text is missing", "top_k"]
    for error, words in zip(bad, named, strict=True):
        assert words in str(error)


def test_a_long_text_is_cut_where_asked(case):
    ask, pipe, _ = case
    text = f"{pipe.tokenizer.mask_token} movie {'a, ' * 90}"
    found = ask({"text": text.encode(), "truncate": True})
    check(found, 0, pipe(text, tokenizer_kwargs={"truncation": True}))


def test_a_tokenizer_without_a_mask_is_refused(tmp_path):
    folder = tiny_encoders.write(tmp_path, "bert", AUTO)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    del stated["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    with pytest.raises(LoadError, match="no mask token"):
        FillMask(folder, EngineConfig(model=str(folder)))
