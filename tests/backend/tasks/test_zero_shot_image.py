"""ZeroShotImage against transformers' own pipeline, on a tiny CLIP of random weights."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.tasks.zero_shot_image import ZeroShotImage

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from serving_tasks import served
from tiny_clip import write_clip
from tiny_encoders import write

LABELS = ["quick brown fox", "river", "a very boring, terrible book", "café"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def picture(seed, width=50, height=37, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height)).convert(mode)


def file(image, kind="PNG"):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def row(image, labels=LABELS, **options):
    return {"image": image, "labels": [label.encode() for label in labels], **options}


def task_of(folder, **config):
    return ZeroShotImage(folder, EngineConfig(model=str(folder), step_tokens=256, **config))


def test_answers_are_the_pipelines_whoever_shares_the_batch(folder):
    pipe = transformers.pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    images = [picture(0), picture(1, 20, 90), picture(2, 64, 64, "RGBA")]
    own = "a {} of nobody"
    both = [row(file(images[0])), row(file(images[1]))]
    other = [row(file(images[2]), LABELS[:2], hypothesis_template=own.encode())]
    with served("zero_shot_image", folder) as ask:
        one, bad, two = ask.together(both, [row(b"no image")], other)
    assert isinstance(bad, InvalidInput)
    expected = [pipe(image, candidate_labels=LABELS) for image in images[:2]]
    same(one, expected)
    same(two, [pipe(images[2], candidate_labels=LABELS[:2], hypothesis_template=own)])
    assert expected[0][0]["score"] - expected[0][-1]["score"] > 0.01, "all labels alike would show nothing"


@pytest.mark.parametrize("heads", [4, 1])
def test_two_ranks_answer_as_one_does(heads, tmp_path):
    """Four heads are shared by the ranks; a single one is not, so each rank has the whole model."""
    made = write_clip(tmp_path, heads)
    pipe = transformers.pipeline("zero-shot-image-classification", model=str(made), device="cpu")
    images = [picture(0), picture(1, 20, 90)]
    with served("zero_shot_image", made, tensor_parallel=2) as ask:
        (found,) = ask.together([row(file(image)) for image in images])
    same(found, [pipe(image, candidate_labels=LABELS) for image in images])


def same(outputs, expected):
    labels = [[label.decode() for label in each] for each in outputs["label"]]
    assert labels == [[each["label"] for each in answer] for answer in expected]
    scores = [[each["score"] for each in answer] for answer in expected]
    np.testing.assert_allclose(outputs["score"], scores, rtol=1e-4)


def test_sentences_are_sent_once_and_within_the_budget(folder):
    task = task_of(folder)
    items = [task.parse(row(file(picture(seed)), labels)) for seed, labels in enumerate([LABELS, LABELS[::-1]])]
    pieces = [piece for own in task.prepare(items) for piece in own]
    assert task.cut(pieces) == [[0, 1]]
    batch = task.batch(pieces)
    assert batch["ids"].shape == (4, max(batch["lengths"])) and batch["columns"] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert (batch["ids"][0][batch["lengths"][0] :] == 1).all(), "padded with the tokenizer's own token"
    others = [task.prepare([task.parse(row(file(picture(0)), [f"{n} fox {m}" for m in range(8)]))])[0][0] for n in "ab"]
    assert task.cut([*pieces, *others]) == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"labels": [b"a"]}, "image is missing"),
        (row(b"GIF89a"), "image is not an image file"),
        (row(file(picture(0)), []), "labels is missing or empty"),
        (row(file(picture(0)), ["a", ""]), "none may be empty"),
        (row(file(picture(0)), ["a"] * 9), r"labels has 9 entries, the limit is 8 \(max_texts\)"),
        (row(file(picture(0)), hypothesis_template=b"a photo"), "hypothesis_template must hold {}"),
        (row(file(picture(0, 70, 60))), r"image has 70 x 60 pixels, the limit is 4096 \(max_pixels\)"),
        (row(file(picture(0, 500, 4))), "image has 500 x 4 pixels"),
    ],
)
def test_bad_values_are_named(folder, given, reason):
    with pytest.raises(InvalidInput, match=reason):
        task_of(folder, max_texts=8, max_pixels=4096).parse(given)


def test_a_label_too_long_for_the_model_fails_alone(folder):
    task = task_of(folder)
    long, fine = (task.parse(row(file(picture(0)), [label])) for label in ("and fox " * 40, "fox"))
    failed, found = task.prepare([long, fine])
    assert isinstance(failed, InvalidInput) and "the model takes 64" in str(failed)
    assert len(found) == 1


def test_what_cannot_be_served_is_refused(folder, tmp_path):
    with pytest.raises(LoadError, match="bert cannot be served"):
        task_of(write(tmp_path))


def test_weights_are_not_packed(folder):
    with pytest.raises(LoadError, match="quantization 'int8': CLIP is served in dtype"):
        task_of(folder, quantization="int8")
