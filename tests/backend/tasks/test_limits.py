"""Every task at its limit of bytes, and one past it. docs/faults.md, 18."""

import io
import itertools
import sys
from pathlib import Path

import pytest
from PIL import Image

from backend.config import EngineConfig
from backend.errors import InvalidInput
from backend.tasks import TASKS, find

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_tasks

LIMIT = 24
FULL, OVER = b"[MASK]".ljust(LIMIT, b"x"), b"[MASK]".ljust(LIMIT + 1, b"x")


def cases(task):
    """Each text that a row must have: alone and at its limit; past it, in a list that is past it as a whole."""
    texts = [name for name in tiny_tasks.required(task) if "image" not in name]
    least = {name: [b"a"] if tiny_tasks.required(task)[name] else b"a" for name in texts}
    for name in texts:
        last, over = ([FULL], [FULL[:-1], b"ab"]) if tiny_tasks.required(task)[name] else (FULL, OVER)
        yield task, name, {**least, name: last}, {**least, name: over}


CASES = [
    *itertools.chain.from_iterable(map(cases, TASKS)),
    ("embed", "prompt", {"text": b"a", "prompt": FULL}, {"text": b"a", "prompt": OVER}),
    ("classify", "text_pair", {"text": b"a", "text_pair": FULL}, {"text": b"a", "text_pair": OVER}),
    (
        "rerank",
        "query, repeated for each of texts,",
        {"query": b"x" * 12, "texts": [b"a", b"b"]},
        {"query": b"x" * 13, "texts": [b"a", b"b"]},
    ),
    (
        "zero_shot_image",
        "hypothesis_template, repeated for each of labels,",
        {"labels": [b"a", b"b"], "hypothesis_template": b"{}".ljust(12)},
        {"labels": [b"a", b"b"], "hypothesis_template": b"{}".ljust(13)},
    ),
    (
        "text_to_image",
        "negative_prompt",
        {"prompt": b"a", "negative_prompt": FULL},
        {"prompt": b"a", "negative_prompt": OVER},
    ),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """By name, made when first asked for."""
    made = {}

    def task(name):
        if name not in made:
            folder = tiny_tasks.write(name, tmp_path_factory.mktemp(name))
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
    more = {"image": image()} if "image" in tiny_tasks.required(name) else {}
    assert tasks(name).parse({**last, **more})
    with pytest.raises(InvalidInput, match=rf"^{what} has \d+ bytes, the limit is {LIMIT} \(max_prompt_bytes\)$"):
        tasks(name).parse({**over, **more})
