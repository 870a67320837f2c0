"""classify, qa and text_to_image on their samples, the other tasks on tiny models, through a real tritonserver and our
client: the answers are right, and those of the libraries."""

import io
import json
import os
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fakes")]

import tiny_tasks  # noqa: E402
from serving import running  # noqa: E402

from backend import repository, samples  # noqa: E402
from backend.tasks import TASKS  # noqa: E402
from backend.training import handwriting  # noqa: E402
from client import InvalidInput  # noqa: E402

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = HERE.parents[1]
PERF = sorted(path.stem for path in (ROOT / "perf").glob("*.json") if path.stem in TASKS)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    models, place = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("tiny")
    for task in TASKS:
        model = samples.fetch(task) if task in samples.SAMPLES else tiny_tasks.write(task, place / task)
        repository.write(models, task, task, {"model": str(model), "dtype": "float32"})
    with running(tmp_path_factory.mktemp("served"), models) as server:
        server.clip = place / "zero_shot_image"
        yield server


def held_out(task):
    return json.loads((samples.fetch(task) / "heldout.json").read_text())


def test_classify_is_right_and_equals_transformers(server):
    from transformers import pipeline as theirs

    rows = held_out("classify")[:500]
    with server.of("classify") as pipe:
        found = pipe([row["text"] for row in rows])
    assert np.mean([labels[0].label == row["label"] for labels, row in zip(found, rows, strict=True)]) >= 0.83
    torch.set_num_threads(1)
    expected = theirs("text-classification", str(samples.fetch("classify")), dtype=torch.float32)(
        [row["text"] for row in rows], top_k=None, truncation=True, batch_size=25
    )
    for ours, their in zip(found, expected, strict=True):
        assert [label.label for label in ours] == [each["label"] for each in their]
        assert [label.score for label in ours] == pytest.approx([each["score"] for each in their], abs=1e-4)


def test_qa_is_right(server):
    rows = held_out("qa")
    with server.of("qa") as pipe:
        found = pipe(question=[row["question"] for row in rows], context=[row["context"] for row in rows])
    right = [answer.answer == row["answer"] for answer, row in zip(found, rows, strict=True)]
    assert len(rows) >= 200 and np.mean(right) >= 0.9
    for answer, row in zip(found, rows, strict=True):
        assert row["context"][answer.start : answer.end] == answer.answer


def test_digits_are_recognised_and_diffusers_own(server):
    from diffusers import StableDiffusionPipeline

    asked = [*range(10)] * 4
    prompts = [f"a handwritten {handwriting.NAMES[digit]}" for digit in asked]
    with server.of("text_to_image") as pipe:
        images = pipe(prompts, seed=[*range(40)], num_inference_steps=20, guidance_scale=4.0)
        three = pipe("a handwritten three", seed=7, num_inference_steps=5)[0]
    drawn = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    assert np.mean(handwriting.recogniser().predict(handwriting.shrink(drawn)) == asked) >= 0.8
    torch.set_num_threads(1)
    theirs = StableDiffusionPipeline.from_pretrained(samples.fetch("text_to_image"), safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(7)
    (expected,) = theirs("a handwritten three", num_inference_steps=5, generator=seed).images
    assert np.array_equal(np.asarray(three), np.asarray(expected))


def test_the_other_tasks_answer(server):
    with server.of("rerank") as pipe:
        ranked = pipe("the cat", ["a dog runs", "the cat sat", "no"], top_k=2)
        assert len(ranked) == 2 and ranked[0].score >= ranked[1].score
    with server.of("token_classification") as pipe:
        text = "the cat sat"
        for entity in pipe(text):
            assert text[entity.start : entity.end].lower() == entity.word
    with server.of("fill_mask") as pipe:
        found = pipe("the [MASK] sat", top_k=3)
        assert len(found) == 3 and found[0].score >= found[2].score
        with pytest.raises(InvalidInput, match=r"\[MASK\]"):
            pipe("no mask here")
    picture = Image.new("RGB", (50, 37), "red")
    with server.of("zero_shot_image") as pipe:
        found = pipe(picture, ["a cat", "a dog", "nothing"])
        assert sum(label.score for label in found) == pytest.approx(1.0, abs=1e-5)
        theirs = transformers.pipeline("zero-shot-image-classification", str(server.clip), device="cpu")
        expected = theirs(picture, candidate_labels=["a cat", "a dog", "nothing"])
    assert [label.label for label in found] == [each["label"] for each in expected]
    assert [label.score for label in found] == pytest.approx([each["score"] for each in expected], abs=1e-4)


def executions(server, task):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    (count,) = re.findall(rf'^nv_inference_exec_count{{.*model="{task}".*}} (\d+)$', text, re.M)
    return int(count)


@pytest.mark.parametrize("task", ["rerank", "zero_shot_image"])
def test_requests_with_lists_of_different_lengths_are_gathered(server, task):
    """Neighbours differ: without allow_ragged_batch the dynamic batcher executes each alone.

    They are sent behind large requests, which a stub of any speed reads for longer than these take to arrive.
    """
    first, large = "the cat", (["the cat sat on it " * 40] * 256,)
    if task == "zero_shot_image":
        first, large = Image.new("RGB", (50, 37), "red"), (["a cat"],)
    lists = [[f"a dog {at}" for at in range(1 + number % 7)] for number in range(64)]
    before = executions(server, task)
    with server.of(task) as pipe, ThreadPoolExecutor(80) as pool:
        slow = [pool.submit(pipe, speckled() if task == "zero_shot_image" else first, *large) for _ in range(12)]
        found = [*pool.map(lambda texts: pipe(first, texts), lists)]
        assert all(each.result() for each in slow)
    assert [len(each) for each in found] == [len(texts) for texts in lists]
    assert executions(server, task) - before < 32


@cache
def speckled():
    """The content of an image of four megapixels, slow to decode."""
    content = io.BytesIO()
    Image.effect_noise((2048, 2048), 80).convert("RGB").save(content, "JPEG")
    return content.getvalue()


def test_every_task_has_inputs_for_perf_analyzer():
    assert {*PERF} == {*TASKS}


@pytest.mark.parametrize("task", PERF)
def test_perf_analyzers_inputs_run(server, task):
    quick = ["--measurement-mode", "count_windows", "--stability-percentage", "999", "--measurement-request-count", "2"]
    line = [ROOT / "scripts" / "perf", "-u", f"127.0.0.1:{server.port}", "-m", task, *quick, "--concurrency-range", "2"]
    environment = os.environ | {"TRITONSPEED_PYTHON": sys.executable}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "throughput" in done.stdout
