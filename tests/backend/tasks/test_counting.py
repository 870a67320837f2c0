"""What a task's requests and micro-batches add to its tally."""

import numpy as np
import pytest

from backend.compute.encoders.buckets import Bucket
from backend.errors import Cancelled, DeadlineExceeded, InvalidInput
from backend.metrics import TASK
from backend.tally import Tally
from backend.tasks.request import Request
from backend.tasks.service import _tokens
from backend.tasks.text import Piece, Ready, Texts


class Asked:
    def answer(self, outputs):
        pass

    def fail(self, error):
        pass


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [({}, "stop"), (InvalidInput("x"), "error"), (DeadlineExceeded("x"), "deadline"), (Cancelled("x"), "cancelled")],
)
def test_a_request_counts_once_by_how_it_ended(outcome, reason):
    tally = Tally(TASK)
    request = Request(Asked(), tally)
    request.settle(outcome)
    request.settle(InvalidInput("later"))
    assert {name: count for name, count in tally.finished.items() if count} == {reason: 1}
    assert len(tally.latency) == (reason == "stop")


def test_tokens_and_padding_of_a_micro_batch():
    texts = Texts.of([Piece(np.zeros(length, np.int32), np.zeros(length, np.int32)) for length in (8, 2, 5)])
    assert _tokens(texts, 3, Ready()) == (15, 24)
    assert _tokens(texts, 3, Ready(packed=True)) == (15, 15)
    assert _tokens({"images": []}, 3, Ready()) == (3, 3)


@pytest.mark.parametrize(("tokens", "computed"), [(15, 128), (128, 128), (1000, 1024), (1025, 1152), (2049, 2049)])
def test_packed_texts_are_filled_up_to_the_size_of_a_graph_where_there_is_one(tokens, computed):
    texts = Texts.of([Piece(np.zeros(length, np.int32), np.zeros(length, np.int32)) for length in (1, tokens - 1)])
    assert Ready(packed=True, graphed=2048).computed(texts) == computed
    assert tokens > 2048 or Bucket.of(texts.lengths).tokens == computed
