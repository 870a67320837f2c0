"""Every failure has a status and says something."""

import pytest

from backend import errors
from backend.errors import InvalidInput, LoadError, ServingError, one_line, require, serving

CODES = {"INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServingError)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_has_a_status_and_opens_its_message(kind):
    assert kind.code in CODES
    assert kind("too long").wire() == f"{kind.__name__}: too long"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b\tc "), "a b c"),
        (ValueError("x" * 300), "x" * 200),
        (RuntimeError(), "RuntimeError"),
        (AssertionError(" \n"), "AssertionError"),
    ],
    ids=repr,
)
def test_a_line_is_one_line_and_never_empty(error, line):
    assert one_line(error) == line


def test_a_failure_of_others_is_named_by_its_class():
    found = serving(KeyError("text"))
    assert type(found) is ServingError and str(found) == "KeyError: 'text'"
    own = InvalidInput("seed")
    assert serving(own) is own


def test_what_does_not_hold_is_a_load_error():
    require(True, "never")
    with pytest.raises(LoadError, match=r"^tensor_parallel$"):
        require(False, "tensor_parallel")
