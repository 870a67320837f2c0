"""Any answer that a server may give is decoded or one of the client's errors; so is any failure's text."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from client import errors
from client.errors import Error
from client.tensors import decode, encode
from client.transport import Response

TYPES = ["BYTES", "INT32", "FP32", "UINT64", "BOOL", "FP16", "BF16", "", "NOTHING"]
RAW = st.one_of(st.binary(max_size=24), st.sampled_from([b"\1\0\0\0a", b"\1\0\0\0\xff", b"\xff\xff\xff\x7f", bytes(8)]))
OUTPUT = st.tuples(
    st.sampled_from(["text_output", "image", "score"]),
    st.sampled_from(TYPES),
    st.lists(st.integers(-2, 4), max_size=3),
    RAW,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(OUTPUT, max_size=3), st.booleans())
def test_any_response_is_decoded_or_an_error_of_ours(outputs, lost):
    response = Response()
    for name, datatype, shape, raw in outputs:
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    if lost and outputs:
        del response.raw_output_contents[-1]
    try:
        found = decode(response)
    except Error:
        return
    assert found.keys() == {name for name, *_ in outputs}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5), st.lists(st.floats(width=32), min_size=1))
def test_what_is_encoded_is_decoded(files, numbers):
    sent = encode("m", {"image": np.array([files], object), "score": np.array([numbers], np.float32)})
    response = Response(raw_output_contents=sent.raw_input_contents)
    for tensor in sent.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    found = decode(response)
    assert found["image"].tolist() == [files]
    np.testing.assert_array_equal(found["score"], np.array([numbers], np.float32))


NAMES = [*errors._BY_NAME, "Nothing", ""]
CODES = [*errors._BY_CODE, "INTERNAL", "UNKNOWN", "OK", ""]


@given(st.sampled_from(CODES), st.sampled_from(NAMES), st.text(max_size=60), st.sampled_from(["", "127.0.0.1:1"]))
def test_any_failure_is_an_error_of_ours(code, name, text, address):
    found = errors.failure(code, f"{name}: {text}", address)
    assert isinstance(found, Error) and isinstance(str(found), str)
    if name in errors._BY_NAME and text.strip():
        assert isinstance(found, errors._BY_NAME[name])
