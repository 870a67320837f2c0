"""The tree of errors: what becomes which class, what each message says."""

import pytest

from client import errors
from client.errors import failure


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        ("InvalidInput: top_p must be positive", errors.InvalidInput, "top_p must be positive"),
        ("Overloaded: 1024 wait", errors.Overloaded, "1024 wait"),
        ("EngineDown: rank 1 died", errors.Unavailable, "rank 1 died"),
        ("DeadlineExceeded: after 2 s", errors.DeadlineExceeded, "after 2 s"),
        ("Cancelled: the client left", errors.Cancelled, "the client left"),
        ("LoadError: no such folder", errors.Unavailable, "no such folder"),
        ("ServingError: KeyError: 'x'", errors.ServerError, "KeyError: 'x'"),
        ("Failed to process the request(s) for 'm', message: InvalidInput: bad", errors.InvalidInput, "bad"),
        ("something else", errors.Unavailable, "something else"),
        ("a text that mentions Overloaded: yes", errors.Unavailable, "a text that mentions Overloaded: yes"),
    ],
)
def test_the_name_in_the_message_wins_over_the_status(message, kind, text):
    found = failure("UNAVAILABLE", message, "here:1")
    assert type(found) is kind
    assert str(found).startswith(text + " [here:1]")


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        ("INVALID_ARGUMENT", "unexpected shape for input 'top_p'", errors.InvalidInput),
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", errors.InvalidInput),
        ("UNAVAILABLE", "Request for unknown model: 'x' version 1 is not at ready state", errors.Unavailable),
        ("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (5 vs. 4)", errors.InvalidInput),
        ("RESOURCE_EXHAUSTED", "too many", errors.Overloaded),
        ("DEADLINE_EXCEEDED", "", errors.DeadlineExceeded),
        ("CANCELLED", "", errors.Cancelled),
        ("INTERNAL", "boom", errors.ServerError),
        ("UNIMPLEMENTED", "Method not found!", errors.ServerError),
        ("PERMISSION_DENIED", "", errors.InvalidInput),
        ("UNKNOWN", "", errors.ServerError),
    ],
)
def test_statuses_of_triton_and_grpc(code, message, kind):
    found = failure(code, message)
    assert type(found) is kind
    assert found.code == code
    assert str(found).startswith(message or code)


@pytest.mark.parametrize(
    ("message", "kind", "start"),
    [
        ("Request for unknown model: 'nix' is not found", errors.InvalidInput, "Request for"),
        ("Request for unknown model: 'm' has no available versions", errors.Unavailable, "Request for"),
        ("unexpected inference input 'temperature' for model 'm'", errors.InvalidInput, "unexpected"),
        (
            "[request id: <id_unknown>] unexpected shape for input 'a'. Expected [-1,1], got [1]. NOTE: x",
            errors.InvalidInput,
            "unexpected shape for input 'a'. Expected [-1,1], got [1].",
        ),
        (
            "[request id: <id_unknown>] inference request batch-size must be <= 8 for 'm'",
            errors.InvalidInput,
            "inference request batch-size",
        ),
        ("ServingError: KeyError: inference input", errors.ServerError, "KeyError"),
    ],
)
def test_what_triton_2_51_says_on_a_stream_with_status_internal(message, kind, start):
    found = failure("INTERNAL", message)
    assert type(found) is kind
    assert str(found).startswith(start)
    assert "request id" not in str(found) and "NOTE" not in str(found)
    assert found.retryable == (kind is errors.Unavailable)


def test_each_class_says_what_to_do():
    for code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "NOT_FOUND"):
        assert "; " in str(failure(code, "what"))


def test_only_unavailable_is_retried_and_never_a_deadline():
    assert failure("UNAVAILABLE", "EngineDown: x").retryable
    assert failure("UNAVAILABLE", "Overloaded: x").retryable
    assert not failure("UNAVAILABLE", "DeadlineExceeded: x").retryable
    assert failure("INTERNAL", "EngineDown: x").retryable  # a stream's message, which comes without its status
    assert not failure("INTERNAL", "DeadlineExceeded: x").retryable
    assert not failure("INTERNAL", "ServingError: x").retryable
    assert not errors.Unavailable("made here").retryable


def test_the_drawing_names_every_class():
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert classes == {
        word for line in errors.__doc__.splitlines() for word in line.split()[:2] if word in vars(errors)
    }
    assert all(issubclass(getattr(errors, name), errors.Error) for name in classes)
