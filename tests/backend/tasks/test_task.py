"""What tasks share in reading values and writing tensors."""

import numpy as np
import pytest

from backend.errors import InvalidInput
from backend.tasks import TASKS
from backend.tasks.task import decode, filled, number, text_of, texts, texts_of


def test_texts_are_utf8():
    assert text_of({"text": "東京".encode()}, "text", 6) == "東京"
    with pytest.raises(InvalidInput, match="text is missing"):
        text_of({}, "text", 6)
    with pytest.raises(InvalidInput, match=r"text has 7 bytes, the limit is 6 \(max_prompt_bytes\)"):
        text_of({"text": "東京.".encode()}, "text", 6)
    for value in (b"\xff\xfe", 3.5, None, 8):
        with pytest.raises(InvalidInput, match="text is not valid UTF-8"):
            decode(value, "text")


def test_lists_of_texts_have_a_count_and_bytes_together():
    assert texts_of({"labels": [b"ab", b"c"]}, "labels", 2, 3) == ["ab", "c"]
    assert texts_of({"labels": b"ab"}, "labels", 2, 3) == ["ab"]
    for value, reason in (
        ([], "labels is missing or empty"),
        ([b"a"] * 3, r"labels has 3 entries, the limit is 2 \(max_texts\)"),
        ([b"ab", b"cd"], r"labels has 4 bytes, the limit is 3 \(max_prompt_bytes\)"),
        ([b"a", b"\xff"], r"labels\[1\] is not valid UTF-8"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            texts_of({"labels": value}, "labels", 2, 3)


def test_numbers_have_bounds():
    assert number({}, "top_k", 5, 1, 9) == 5
    assert number({"top_k": 9}, "top_k", 5, 1, 9) == 9
    for value in (0, 10):
        with pytest.raises(InvalidInput, match=f"top_k must be from 1 to 9, not {value}"):
            number({"top_k": value}, "top_k", 5, 1, 9)


def test_rows_of_different_lengths_are_filled():
    np.testing.assert_array_equal(filled([[1, 2, 3], [], [4]], -1, np.int32), [[1, 2, 3], [-1, -1, -1], [4, -1, -1]])
    made = texts([["a", "ü"], ["b"]])
    assert made.tolist() == [[b"a", "ü".encode()], [b"b", b""]]
    assert filled([], 0.0, np.float32).shape == (0, 0)
    assert filled([[], []], 0.0, np.float32).shape == (2, 0)


def test_every_task_names_a_class():
    assert all(place.startswith("backend.tasks.") and place.count(":") == 1 for place in TASKS.values())
