"""What tasks share in reading values and writing tensors."""

import numpy as np
import pytest

from backend.errors import InvalidInput
from backend.tasks import TASKS
from backend.tasks.task import decode, filled, number, text_of, texts


def test_texts_are_utf8():
    assert text_of({"text": "東京".encode()}, "text") == "東京"
    with pytest.raises(InvalidInput, match="text is missing"):
        text_of({}, "text")
    for value in (b"\xff\xfe", 3.5, None):
        with pytest.raises(InvalidInput, match="text is not valid UTF-8"):
            decode(value, "text")


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
