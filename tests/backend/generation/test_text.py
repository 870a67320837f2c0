"""Pieces join to the whole for every kind of tokenizer; stop strings never leak, however the text is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from backend.generation.text import UNFINISHED, Detokenizer, StopStrings, Text
from backend.generation.tokenizer import Tokenizer

SAMPLES = [
    "The quick brown fox jumps over the lazy dog.  Two spaces,\ttabs\n\nand lines.  ",
    " leading space, and trailing ",
    "天地玄黃,宇宙洪荒。日月盈昃,辰宿列張。",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "हिन्दी में एक वाक्य, ภาษาไทย, မြန်မာဘာသာ, 한국어 문장, עברית",
    "👩‍👩‍👧‍👦 🇨🇭 👍🏽 é e\u0301 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \ufffd \ufffd\ufffd x",
    "it 's a dog . is n't it ? we 've , they 're ' quoted ' !",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # comment\r\n",
]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    train(made, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]))
    return made


def byte_fallback(strip: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 (which strips a first space) and Gemma (which does not): few characters known, the others as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,'天é\ufffd", "▁th", "he", "▁▁", "▁a", "th"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("▁", "th"), ("h", "e"), ("▁", "▁"), ("▁", "a")]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strip)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def metaspace() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    train(made, trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>"))
    return made


def word_piece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    train(made, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[SEP]"]))
    return made


def word_piece_of_its_own_cleaning() -> tokenizers.Tokenizer:
    made = word_piece()
    made.decoder = decoders.WordPiece()
    return made


def suffix() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    train(made, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>"))
    return made


def train(made: tokenizers.Tokenizer, trainer: object) -> None:
    trainer.show_progress = False  # type: ignore[attr-defined]
    made.train_from_iterator(SAMPLES * 3, trainer)


CLEANED = {"clean_up_tokenization_spaces": True}
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: Tokenizer(byte_level(), {"eos_token": "</s>"}),
    "byte fallback, stripped": lambda: Tokenizer(byte_fallback(), {"bos_token": "<s>"}),
    "byte fallback": lambda: Tokenizer(byte_fallback(strip=False), {"bos_token": "<s>"}),
    "metaspace": lambda: Tokenizer(metaspace(), {}),
    "metaspace, cleaned": lambda: Tokenizer(metaspace(), CLEANED),
    "word piece": lambda: Tokenizer(word_piece(), {}),
    "word piece, cleaned": lambda: Tokenizer(word_piece(), CLEANED),
    "word piece, cleaned by itself": lambda: Tokenizer(word_piece_of_its_own_cleaning(), {}),
    "suffix": lambda: Tokenizer(suffix(), {}),
}


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def pieces(made: Tokenizer, ids: list[int], cuts: random.Random) -> Iterator[str]:
    detokenizer, at = Detokenizer(made), 0
    while at < len(ids):
        size = cuts.choice([1, 1, 1, 2, 5, 40])
        yield detokenizer.push(ids[at : at + size])
        at += size
    yield detokenizer.flush()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 650), max_size=120), st.randoms(use_true_random=False))
def test_pieces_of_any_ids_join_to_their_decode(tokenizer: Tokenizer, ids: list[int], cuts: random.Random) -> None:
    assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=100)
@given(st.text(), st.randoms(use_true_random=False))
def test_pieces_of_any_text_join_to_their_decode(tokenizer: Tokenizer, text: str, cuts: random.Random) -> None:
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", SAMPLES)
def test_languages(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text * 5)
    for seed in range(5):
        assert "".join(pieces(tokenizer, ids, random.Random(seed))) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 255), max_size=90), st.randoms(use_true_random=False))
def test_bytes_that_are_no_characters(values: list[int], cuts: random.Random) -> None:
    for made in (BYTES, FALLBACK):
        ids = [made.token_id(name) for name in map(NAMES[made].__getitem__, values)]
        assert "".join(pieces(made, ids, cuts)) == made.decode(ids)  # type: ignore[arg-type]


BYTES, FALLBACK = KINDS["byte level"](), KINDS["byte fallback"]()
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 writes bytes: the others from U+0100 on
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
NAMES = {
    BYTES: {byte: chr(byte) if byte in _SHOWN else chr(256 + _HIDDEN.index(byte)) for byte in range(256)},
    FALLBACK: {byte: f"<0x{byte:02X}>" for byte in range(256)},
}


def test_only_whole_characters_are_given() -> None:
    ids = BYTES.encode("a👩‍👧b")
    found = [BYTES.decode([token_id]) for token_id in ids]
    assert any(UNFINISHED in text for text in found), "the characters must span tokens"
    detokenizer = Detokenizer(BYTES)
    given_ = [detokenizer.push([token_id]) for token_id in ids]
    assert not any(UNFINISHED in text for text in given_)
    assert "".join(given_) == "a👩‍👧b"


def test_text_comes_with_its_token_and_spaces_are_kept() -> None:
    detokenizer = Detokenizer(FALLBACK)
    the, a = (FALLBACK.token_id(token) for token in ("▁th", "▁a"))
    special = FALLBACK.token_id("<s>")
    assert the is not None and a is not None and special is not None
    assert [detokenizer.push([token_id]) for token_id in (the, special, a, the)] == [" th", "", " a", " th"]


def test_an_unfinished_character_comes_with_the_end() -> None:
    ids = BYTES.encode("x👍")[:-1]
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push(ids) == "x"
    assert detokenizer.flush() == UNFINISHED
    assert detokenizer.flush() == ""


def test_a_long_text_is_not_decoded_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    longest, decode = 0, BYTES.decode_raw

    def measured(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(BYTES, "decode_raw", measured)
    ids = [BYTES.token_id(NAMES[BYTES][0x80])] * 500 + BYTES.encode("abc " * 500)
    detokenizer = Detokenizer(BYTES)
    for token_id in ids:
        detokenizer.push([token_id])  # type: ignore[list-item]
    assert longest < 30


# --- stop strings


def cut_at(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        if found := [end - len(s) for s in stop if text[:end].endswith(s)]:
            return text[: min(found)]
    return text


few = st.text(alphabet="abc", max_size=40)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4).map(tuple)


@settings(deadline=None, max_examples=500)
@given(few, stops, st.randoms(use_true_random=False))
@example("aabaaab", ("aaab",), random.Random(0))
@example("abc", ("bc", "abc"), random.Random(0))
def test_stop_strings_however_the_text_is_cut(text: str, stop: tuple[str, ...], cuts: random.Random) -> None:
    found, at, emitted = StopStrings(stop), 0, ""
    while at < len(text):
        size = cuts.randint(1, 7)
        piece, stopped = found.push(text[at : at + size])
        assert stopped == found.stopped
        emitted += piece
        assert cut_at(text, stop).startswith(emitted), "a part of a stop string leaked"
        at += size
    emitted += found.flush()
    assert emitted == cut_at(text, stop)
    assert found.stopped == any(s in text for s in stop)


def test_no_more_is_held_back_than_a_stop_string_could_need() -> None:
    found = StopStrings(("\nUser:", "END"))
    assert found.push("Hello\nUs") == ("Hello", False)
    assert found.push("age EN") == ("\nUsage ", False)
    assert found.push("D of it") == ("", True)
    assert found.push("more") == ("", True)
    assert found.flush() == ""


# --- together


@settings(deadline=None, max_examples=150)
@given(
    st.text(alphabet="ab 天👍", max_size=40), st.lists(st.text(alphabet="ab 天👍", min_size=1, max_size=4), max_size=3)
)
def test_text_stops_over_token_borders(text: str, stop: list[str]) -> None:
    made, found = BYTES, ""
    mine = Text(made, tuple(stop))
    for token_id in made.encode(text):
        found += mine.push([token_id])
        if mine.stopped:
            break
    found += mine.finish()
    assert found == cut_at(text, tuple(stop))
    assert mine.stopped == any(s in text for s in stop)
    assert mine.finish() == ""


def test_a_stop_string_in_the_rest_is_found() -> None:
    made = FALLBACK
    mine = Text(made, ("👍",))
    assert mine.push(made.encode("a👍")) == ""  # a run of bytes may go on
    assert not mine.stopped
    assert mine.finish() == " a"
    assert mine.stopped


def test_smollm2_text_streams_as_it_decodes(smollm2: Path) -> None:
    made = Tokenizer.from_folder(smollm2)
    for number, text in enumerate(SAMPLES):
        ids = made.encode(text * 3)
        assert "".join(pieces(made, ids, random.Random(number))) == made.decode(ids)
    rng = random.Random(0)
    for number in range(100):
        ids = [rng.randrange(made.vocab_size + 50) for _ in range(100)]
        assert "".join(pieces(made, ids, random.Random(number))) == made.decode(ids)
