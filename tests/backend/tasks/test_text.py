"""TextTask: micro-batches within the budget, and texts and pairs cut as transformers cuts them."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from tiny_encoders import TEXT, save_tokenizer, write

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.tasks.text import Piece, Texts, TextTask

WORDS = TEXT.split()


class Plain(TextTask):
    auto = "AutoModel"


def plain(folder, **settings):
    return Plain(folder, EngineConfig(model=str(folder), **settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    return {family: write(root / family, family, "AutoModel") for family in ("bert", "roberta")}


def piece(length):
    return Piece(np.arange(length, dtype=np.int32), np.zeros(length, np.int32), {"length": length})


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_hold_every_piece_once_within_the_budget(folders, seed):
    rng = random.Random(seed)
    task = plain(folders["bert"], step_tokens=rng.choice([1, 16, 64, 500]))
    pieces = [piece(rng.randint(1, 64)) for _ in range(rng.randint(0, 60))]
    batches = task.cut(pieces)
    assert sorted(place for places in batches for place in places) == [*range(len(pieces))]
    for places in batches:
        longest = max(len(pieces[place].ids) for place in places)
        assert len(places) == 1 or longest * len(places) <= task.config.step_tokens
    firsts = [len(pieces[places[0]].ids) for places in batches]
    assert firsts == sorted(firsts, reverse=True)


def test_what_is_packed_may_hold_padding_but_not_without_end(folders):
    pieces = [piece(64), *(piece(1) for _ in range(100))]
    padded, packed = (plain(folders["bert"], step_tokens=320, device=device) for device in ("cpu", "cuda"))
    assert [len(places) for places in padded.cut(pieces)] == [5, 96]
    assert [len(places) for places in packed.cut(pieces)] == [10, 91]
    assert [len(places) for places in packed.cut([piece(40)] * 20)] == [8, 8, 4]


def test_a_micro_batch_lies_end_to_end():
    batch = Texts.of([piece(3), piece(1)])
    assert (batch.input_ids.tolist(), batch.lengths.tolist()) == ([0, 1, 2, 0], [3, 1])
    assert batch.options == [{"length": 3}, {"length": 1}]


def _random_text(rng):
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([0, 1, 5, 20, 60])))


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [9, 24, 64])
def test_texts_and_pairs_are_cut_as_transformers_cuts_them(folders, tmp_path, family, side, length):
    for file in folders[family].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_tokenizer(tmp_path, family, truncation_side=side)
    task, reference = plain(tmp_path, max_model_len=length), transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(length)
    texts = [_random_text(rng) for _ in range(8)] + [(_random_text(rng), _random_text(rng)) for _ in range(25)]
    made = task.encode_truncated(texts, [True] * len(texts))
    for text, encoding in zip(texts, made, strict=True):
        given = [[part] for part in ([text] if isinstance(text, str) else text)]  # alone, an empty second is no pair
        expected = reference(*given, truncation="longest_first", max_length=length, return_token_type_ids=True)
        assert encoding.ids == expected["input_ids"][0]
        assert encoding.type_ids == expected["token_type_ids"][0]
        assert len(encoding.ids) <= length


def test_what_may_not_be_cut_fails_alone_and_names_both_lengths(folders):
    task = plain(folders["bert"])
    made = task.encode_truncated(["a", "a " * 100, "a " * 100], [False, False, True])
    assert len(made[0].ids) == 3
    assert isinstance(made[1], InvalidInput)
    assert "102 tokens, the model takes 64" in str(made[1])
    assert len(made[2].ids) == 64


def test_a_text_without_tokens_never_reaches_the_ranks(folders, tmp_path):
    folder = write(tmp_path, "roberta", "AutoModel")
    file = folder / "tokenizer.json"
    import tokenizers

    bare = tokenizers.Tokenizer.from_file(str(file))
    bare.post_processor = tokenizers.processors.ByteLevel()
    bare.save(str(file))
    made = plain(folder).encode_truncated(["", "a"], [True, True])
    assert isinstance(made[0], InvalidInput)
    assert len(made[1].ids) == 1


def test_a_token_that_the_model_does_not_know_never_reaches_the_ranks(folders, tmp_path):
    folder = write(tmp_path, "bert", "AutoModel")
    import tokenizers

    file = folder / "tokenizer.json"
    more = tokenizers.Tokenizer.from_file(str(file))
    more.add_tokens(["zzz"])
    more.save(str(file))
    made = plain(folder).encode_truncated(["a", "a zzz"], [True, True])
    assert len(made[0].ids) == 3
    assert "the model knows" in str(made[1])


def test_lengths(folders):
    assert plain(folders["bert"]).longest == 64
    assert plain(folders["roberta"]).longest == 64  # of 66 positions two are the padding's
    with pytest.raises(LoadError, match="max_model_len 65 is more than the model's 64 positions"):
        plain(folders["roberta"], max_model_len=65)
