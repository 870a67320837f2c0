"""The mailbox between the engine's thread and a reader, and tokens that become text there."""

import sys
from array import array
from pathlib import Path

import pytest

from backend.errors import EngineDown, ServingError
from backend.generation.completion import Completion
from backend.generation.sequence import SamplingParams, Sequence
from backend.generation.stream import Stream
from backend.generation.text import Text
from backend.generation.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))
from tiny import save_llama


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(save_llama(tmp_path_factory.mktemp("tiny"), vocab_size=300))


@pytest.fixture
def make(tokenizer):
    def make(stream, index=0, **params):
        seq = Sequence(array("i", [5]), SamplingParams(**params))
        return Completion(seq, stream, index, Text(tokenizer, seq.params.stop))

    return make


def tell(completion, token, reason="", logprob=None):
    """As the engine does."""
    text = completion.seen(token)
    completion.seq.finish_reason = reason
    completion.stream.put(completion.news(token, text, logprob))


def test_what_came_before_a_failure_is_read_before_it(make, tokenizer):
    stream = Stream(1, notify=(rung := []).append)
    tell(make(stream), 70)
    stream.fail(EngineDown("gone"))
    assert [delta.text for delta in stream.take()] == [tokenizer.decode([70])]
    assert rung == [True, True]  # the second ring makes the reader look again
    with pytest.raises(EngineDown, match="gone"):
        stream.take()


@pytest.mark.parametrize("stop", [(), ("\0never",)])
@pytest.mark.parametrize("looks", [1, 2, 5, 40])
def test_text_does_not_depend_on_how_often_the_reader_looks(make, tokenizer, stop, looks):
    stream, tokens = Stream(2, notify=lambda ended: None), list(range(60, 100))
    two = [make(stream, index, stop=stop) for index in (1, 0)]
    got = {0: "", 1: ""}
    for at, token in enumerate(tokens):
        for completion in two:
            tell(completion, token + completion.index, "length" if at == 39 else "")
        if (at + 1) % (40 // looks) == 0:
            deltas = stream.take()
            assert [delta.index for delta in deltas] == [0, 1]
            for delta in deltas:
                got[delta.index] += delta.text
                assert len(delta.token_ids) == 40 // looks
    assert stream.done and not stream.waiting
    assert got == {index: tokenizer.decode([token + index for token in tokens]) for index in (0, 1)}


def test_a_token_that_ends_the_sequence_says_nothing_and_log_probabilities_add_up(make, tokenizer):
    stream = Stream(1, notify=lambda ended: None)
    completion = make(stream, logprobs=True, stop_token_ids=frozenset({71}))
    tell(completion, 70, logprob=-0.5)
    tell(completion, 71, "stop", logprob=-0.25)
    (delta,) = stream.take()
    assert (delta.text, delta.token_ids, delta.finish_reason) == (tokenizer.decode([70]), [70, 71], "stop")
    assert (delta.logprobs, delta.cumulative_logprob) == ([-0.5, -0.25], -0.75)


def test_a_stop_string_is_seen_at_once(make, tokenizer):
    completion = make(Stream(1, notify=lambda ended: None), stop=(tokenizer.decode([71]),))
    assert completion.seen(70) == tokenizer.decode([70])
    completion.seen(71)
    assert completion.text.stopped


def test_a_token_that_is_none_is_refused(make):
    with pytest.raises(ServingError, match="not finite"):
        make(Stream(1, notify=lambda ended: None)).seen(-1)
