"""Any rows and request parameters that Triton lets through make a generate request or InvalidInput."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backend.config import EngineConfig
from backend.errors import InvalidInput
from backend.generation.params import Defaults
from backend.generation.request import Request
from backend.generation.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from tiny import save_tokenizer

BYTES = st.one_of(
    st.binary(max_size=20),
    st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"[]", b"{}", b'[{"role": "user", "content": "a"}]', b'[{"role": 1}]', b"[" * 3000, b"null"]),
)
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
JSON = st.dictionaries(
    st.sampled_from(["max_tokens", "stop", "n", "seed", "timeout", "priority", "cache_salt", "max_length", "x"]),
    st.one_of(LEAF, st.lists(LEAF, max_size=2)),
    max_size=3,
)
INT32, FP32 = st.integers(-(2**31), 2**31 - 1), st.floats(width=32)
COLUMNS = {
    "text_input": BYTES, "input_ids": st.lists(INT32, max_size=4), "messages": BYTES, "n": st.integers(-1, 5),
    "sampling_parameters": st.one_of(BYTES, JSON.map(lambda found: json.dumps(found).encode())),
    "max_tokens": INT32, "min_tokens": INT32, "temperature": FP32, "top_p": FP32, "top_k": INT32,
    "stop_words": st.lists(BYTES, max_size=3), "stop_token_ids": st.lists(INT32, max_size=3),
    "stream": st.booleans(), "exclude_input_in_output": st.booleans(), "seed": st.integers(0, 2**64 - 1),
}  # fmt: skip
ROW = st.fixed_dictionaries({}, optional=COLUMNS)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """What parsing needs of one."""
    save_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"), 300)
    config = EngineConfig(model=str(folder), max_prompt_bytes=64, max_prompts=4)
    return SimpleNamespace(config=config, defaults=Defaults(), vocab=300, tokenizer=Tokenizer.from_folder(folder))


def test_any_rows_are_a_request_or_invalid_input(engine):
    served = []

    @settings(max_examples=400, deadline=None)
    @given(st.lists(ROW, max_size=3), JSON)
    @example([{"text_input": b"a"}, {"input_ids": [5], "max_tokens": 1}], {})  # chance may make none that is served
    def holds(rows, parameters):
        try:
            found = Request.parse(rows, parameters, engine)
        except InvalidInput as error:
            return fair(str(error))
        assert len(found.prompts) == len(rows)
        served.append(found)

    holds()
    assert served  # not everything is refused


def fair(message):
    """One line, and not the input again."""
    assert "\n" not in message and len(message) < 2000
