"""Every task of texts at its limit of bytes, and one past it. docs/faults.md, 18."""

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from backend.config import EngineConfig
from backend.errors import InvalidInput
from backend.tasks import find

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_encoders
from tiny_clip import write_clip

LIMIT = 24
FULL, OVER = b"[MASK]".ljust(LIMIT, b"x"), b"[MASK]".ljust(LIMIT + 1, b"x")
MADE = {
    "embed": ("AutoModel", {}),
    "classify": (tiny_encoders.SEQUENCE, {"num_labels": 3}),
    "rerank": (tiny_encoders.SEQUENCE, {"num_labels": 1}),
    "token_classification": ("AutoModelForTokenClassification", {}),
    "fill_mask": ("AutoModelForMaskedLM", {}),
    "qa": ("AutoModelForQuestionAnswering", {}),
    "zero_shot_image": ("", {}),
}
TEXT = ("text", {"text": FULL}, {"text": OVER})
CASES = [
    ("embed", *TEXT),
    ("embed", "prompt", {"text": b"a", "prompt": FULL}, {"text": b"a", "prompt": OVER}),
    ("classify", *TEXT),
    ("classify", "text_pair", {"text": b"a", "text_pair": FULL}, {"text": b"a", "text_pair": OVER}),
    ("token_classification", *TEXT),
    ("fill_mask", *TEXT),
    ("rerank", "query", {"query": FULL, "texts": [b"a"]}, {"query": OVER, "texts": [b"a"]}),
    ("rerank", "texts", {"query": b"a", "texts": [FULL]}, {"query": b"a", "texts": [FULL[:-1], b"ab"]}),
    (
        "rerank",
        "query, repeated for each of texts,",
        {"query": b"x" * 12, "texts": [b"a", b"b"]},
        {"query": b"x" * 13, "texts": [b"a", b"b"]},
    ),
    ("qa", "question", {"question": FULL, "context": b"a"}, {"question": OVER, "context": b"a"}),
    ("qa", "context", {"question": b"a", "context": FULL}, {"question": b"a", "context": OVER}),
    ("zero_shot_image", "labels", {"labels": [FULL]}, {"labels": [FULL, b"a"]}),
    (
        "zero_shot_image",
        "hypothesis_template, repeated for each of labels,",
        {"labels": [b"a", b"b"], "hypothesis_template": b"{}".ljust(12)},
        {"labels": [b"a", b"b"], "hypothesis_template": b"{}".ljust(13)},
    ),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """By name, made when first asked for."""
    made = {}

    def task(name):
        if name not in made:
            folder, (auto, config) = tmp_path_factory.mktemp(name), MADE[name]
            folder = tiny_encoders.write(folder, "bert", auto, **config) if auto else write_clip(folder)
            settings = EngineConfig(model=str(folder), device="cpu", step_tokens=64, max_prompt_bytes=LIMIT)
            made[name] = find(name)(folder, settings)
        return made[name]

    return task


def image():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "what", "last", "over"), CASES)
def test_at_the_limit_of_bytes_and_past_it(tasks, name, what, last, over):
    more = {"image": image()} if name == "zero_shot_image" else {}
    assert tasks(name).parse({**last, **more})
    with pytest.raises(InvalidInput, match=rf"^{what} has \d+ bytes, the limit is {LIMIT} \(max_prompt_bytes\)$"):
        tasks(name).parse({**over, **more})
