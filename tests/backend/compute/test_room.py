"""Room: what is left out of a step, how its answer is told, and an encoder without memory for a micro-batch."""

import os
import sys
from array import array
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from backend.compute.encoders.encoder import Encoder
from backend.compute.room import SPARE, Room, told
from backend.config import EngineConfig
from backend.errors import ServingError
from backend.generation.blocks import BlockPool
from backend.generation.plan import Sampled, pack
from backend.generation.scheduler import Scheduler
from backend.generation.sequence import SamplingParams, Sequence
from backend.generation.tokenizer import Tokenizer
from backend.ranks.rank import Birth
from backend.tasks.text import Piece, Texts, TextTask

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))
from serving_tasks import served  # noqa: E402
from tiny_encoders import write  # noqa: E402

EARLY = {"stop_token_ids": frozenset({1, 3}), "min_tokens": 2}
STARVES, FEW = 55, 40
LENGTHS = {2: {}, 9: {"presence_penalty": 1.0, **EARLY}, 8: EARLY, 30: {}}


@pytest.fixture
def chunks():
    """Of 2, 9 and 8 tokens, and 29 of 30, which do not sample."""
    scheduler = Scheduler(BlockPool(50, 4), 8, 48)
    for length, params in LENGTHS.items():
        scheduler.add(Sequence(array("i", range(length, 2 * length)), SamplingParams(max_tokens=8, **params)))
    found = scheduler.schedule()
    assert [chunk.length for chunk in found] == [2, 9, 8, 29] and not found[-1].samples
    return found


def room(limit, device="cpu"):
    """A rank alone with so many bytes."""
    made = Room(torch.device(device), 1)
    made.counted, made._has = True, lambda count: count <= limit
    return made


@pytest.mark.parametrize("index", range(4))
def test_a_plan_without_a_chunk_is_the_plan_of_the_others(chunks, index):
    got, want = pack(chunks, 4).without(index), pack(chunks[:index] + chunks[index + 1 :], 4)
    for ours, theirs in ((got, want), (got.sampling, want.sampling)):
        for field in fields(theirs):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(other, np.ndarray):
                one = one[:, : other.shape[1]] if field.name == "block_tables" else one
                assert one.dtype == other.dtype and one.tolist() == other.tolist(), field.name
    assert [each.slot for each in got.histories] == [each.slot for each in want.histories]


@pytest.mark.parametrize(("limit", "lost"), [(48, []), (47, [3]), (11, [1, 3]), (10, [1, 3]), (2, [1, 2, 3])])
def test_the_longest_chunks_are_left_out_until_the_rest_fits(chunks, limit, lost):
    kept, left_out = room(limit).keep(pack(chunks, 4), lambda plan: len(plan.input_ids))
    assert left_out == lost
    assert len(kept.slots) == 4 - len(lost)


def test_what_allocates_nothing_is_never_left_out(chunks):
    plan = pack(chunks, 4)
    kept, lost = room(-1).keep(plan, lambda plan: 0 if len(plan.slots) < 3 else 1)
    assert lost == [1, 3] and len(kept.slots) == 2
    assert room(-1).keep(plan, lambda plan: 1)[1] == [0, 1, 2, 3]


def test_of_equals_the_last_is_left_out(chunks):
    plan = pack(chunks[:1] * 3, 4)
    assert room(4).keep(plan, lambda plan: len(plan.input_ids))[1] == [2]


def test_where_allocations_do_not_fail_nothing_is_asked(chunks):
    plan = pack(chunks, 4)
    assert Room(torch.device("cpu"), 2).keep(plan, lambda plan: 1) == (plan, [])


@pytest.mark.parametrize("later", [False, True])
def test_the_answer_is_told_in_the_rows_of_the_whole_plan(chunks, later):
    sampled = Sampled(np.array([7, 9], np.int32), np.array([-1, -2], np.float32))
    answer = told((lambda: sampled) if later else sampled, pack(chunks, 4), [1, 3])
    found = answer() if later else answer
    assert found.token_ids.tolist() == [7, -1, 9] and found.logprobs.tolist() == [-1, 0, -2]
    assert found.lost == (1, 3)
    assert told(Sampled(sampled.token_ids, None), pack(chunks, 4), [0, 3]).logprobs is None


def test_an_allocation_that_fails_is_no_room(monkeypatch):
    def empty(count, **options):
        if count > 2 * SPARE:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", empty)
    alone = Room(torch.device("cpu"), 1)
    alone.counted, alone.per_token, alone.per_row = True, 1 << 20, 2 << 20
    assert alone.bytes(0, 0) == SPARE
    assert alone.fits(alone.bytes(32, 16)) and not alone.fits(alone.bytes(33, 16))
    alone.hold(alone.bytes(33, 16))


# ---- encoders


def pieces(*lengths):
    rng = np.random.default_rng(4)
    return [Piece(rng.integers(5, 50, length).astype(np.int32), np.zeros(length, np.int32)) for length in lengths]


def starving(length):
    return Piece(np.full(length, STARVES, np.int32), np.zeros(length, np.int32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("encoder") / "model", "bert", id2label={0: "bad", 1: "good"})


def config(folder, **changes):
    return EngineConfig(model=str(folder), device="cpu", threads=1, step_tokens=256, **changes)


@pytest.fixture
def alone(folder):
    """The encoder of one rank, in this process; its model has no memory for STARVES, nor for more tokens than FEW."""
    worker = Encoder(Birth("", config(folder), 0, 1, "", os.getpid(), "classify"), lambda line: None)
    whole = worker._compute

    def compute(batch):
        if STARVES in batch.input_ids or len(batch.input_ids) > FEW:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(batch)

    worker.expected = lambda batch: worker._task.forward(*[whole(batch)[0], batch, whole(batch)[1]])
    worker._compute = compute
    return worker


GIVEN = [*pieces(20, 18, 7), starving(5), *pieces(12, 3)]


def check(answers, each_alone):
    """All but the starving one's are what they are alone."""
    assert len(answers) == len(GIVEN)
    for index, answer in enumerate(answers):
        if index == 3:
            assert type(answer) is ServingError and "no device memory for a text of 5 tokens; shorten it" in str(answer)
        else:
            np.testing.assert_allclose(answer, each_alone[index], atol=1e-5)


def test_a_micro_batch_is_halved_until_its_parts_fit(alone):
    with torch.inference_mode():
        each_alone = [alone.expected(Texts.of([piece]))[0].numpy() for piece in GIVEN]
    check(alone.forward(Texts.of(GIVEN)), each_alone)


def test_answers_that_come_later_are_joined(alone, monkeypatch):
    with torch.inference_mode():
        each_alone = [alone.expected(Texts.of([piece]))[0].numpy() for piece in GIVEN]
    monkeypatch.setattr(alone, "_answer", lambda values: lambda: values.numpy())  # as on CUDA
    check(alone.forward(Texts.of(GIVEN))(), each_alone)


WORDS = ["a good film", "boring", "Anna Smith of Berlin writes", "what is the answer"]


def test_two_ranks_agree_and_the_request_without_room_fails_alone(folder, monkeypatch):
    """Through the service, all in one micro-batch; rank 1 alone has no memory."""
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)
    monkeypatch.setattr(TextTask, "worker", "failing_encoder:FailingEncoder")
    words = {word: Tokenizer.from_folder(folder).encodings([word])[0].ids for word in WORDS}
    starving, *_ = {*words["boring"]} - {token for word in WORDS if word != "boring" for token in words[word]}
    monkeypatch.setenv("STARVES", str(starving))
    with served("classify", folder, step_tokens=256, tensor_parallel=2) as serve:
        alone = [None if word == "boring" else serve({"text": word.encode()}) for word in WORDS]
        for _ in range(2):
            together = serve.together(*[[{"text": word.encode()}] for word in WORDS])
            for word, outcome, wanted in zip(WORDS, together, alone, strict=True):
                if word == "boring":
                    assert type(outcome) is ServingError and "no device memory" in str(outcome)
                else:
                    np.testing.assert_allclose(outcome["score"], wanted["score"], atol=1e-5)
        assert serve.service.tally.restarts == 0
