"""Any parameters of config.pbtxt and any JSON in a model's folder are read or LoadError."""

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backend import families
from backend.config import EngineConfig
from backend.errors import LoadError
from backend.generation.params import Defaults
from backend.model_folder import Checkpoint
from backend.tasks.sentence_folder import hidden, pooling_of

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import tiny_encoders

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAF = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8))
JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [field.name for field in fields(EngineConfig)]
STRINGS = st.one_of(
    st.text(max_size=10), st.integers().map(str), st.floats().map(str), st.sampled_from(["true", "9" * 5000, "auto"])
)


@settings(max_examples=250, deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "bogus"]), STRINGS, max_size=3))
def test_any_parameters_are_a_configuration_or_a_load_error(parameters):
    with suppress(LoadError):
        found = EngineConfig.from_parameters({"model": "m", **parameters})
        assert found.step_timeout > 0 and found.max_prompts > 0


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_encoders.write(tmp_path_factory.mktemp("bert"), "bert", "AutoModel")


@pytest.fixture
def folder(bert, tmp_path):
    return Path(shutil.copytree(bert, tmp_path / "bert"))


def put(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def keys(*names):
    """Objects with some of these keys, and anything in them."""
    return st.one_of(JSON, st.dictionaries(st.sampled_from(names), JSON, max_size=3))


MODULE = st.fixed_dictionaries({}, optional={
    "type": st.one_of(JSON, st.sampled_from(["x.Transformer", "x.Pooling", "x.Normalize", "x.Dense", ""])),
    "path": st.one_of(JSON, st.sampled_from(["", "1_Pooling", "../x", "/", "\0", "a" * 5000])),
})  # fmt: skip
FIRST = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
POOLING = keys("pooling_mode", "pooling_mode_mean_tokens", "pooling_mode_x", "include_prompt")
GENERAL = keys("prompts", "default_prompt_name", "truncate_dim")
TRANSFORMER = keys("do_lower_case", "max_seq_length", "modality_config", "query_expansion", "transformer_task")


@MANY
@given(st.one_of(JSON, st.lists(MODULE, max_size=4)))
@example([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "a" * 5000}])
def test_any_modules_json(folder, modules):
    put(folder / "modules.json", modules)
    _read(lambda: pooling_of(folder, Checkpoint.open(folder)))


@MANY
@given(POOLING, GENERAL, TRANSFORMER)
def test_any_settings_of_sentence_transformers(folder, pooling, general, transformer):
    put(folder / "modules.json", FIRST)
    put(folder / "1_Pooling" / "config.json", pooling)
    put(folder / "config_sentence_transformers.json", general)
    put(folder / "sentence_bert_config.json", transformer)
    _read(lambda: pooling_of(folder, Checkpoint.open(folder)))


CONFIG = keys(
    "hidden_size", "dtype", "torch_dtype", "vocab_size", "max_position_embeddings", "architectures", "text_config",
    "rope_scaling", "rope_parameters", "model_type", "layer_types", "eos_token_id", "temperature", "top_p",
)  # fmt: skip


@MANY
@given(CONFIG)
def test_any_config_json(folder, config):
    put(folder / "config.json", config)
    put(folder / "generation_config.json", config)
    _read(lambda: Defaults.from_folder(folder))
    _read(lambda: _facts(Checkpoint.open(folder)))


def _facts(found):
    families.refusal(found.config)
    return found.model_type, found.architectures, found.dtype, found.vocab_size, found.max_model_len, hidden(found)


def _read(load):
    with suppress(LoadError):
        load()


@MANY
@given(st.binary(max_size=60))
def test_any_bytes_as_config_json(folder, data):
    (folder / "config.json").write_bytes(data)
    _read(lambda: Checkpoint.open(folder))


@MANY
@given(st.binary(max_size=80), st.integers(0, 200))
def test_any_weights(folder, data, at):
    """The head of a safetensors file overwritten."""
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes()[:4000])
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    _read(lambda: Checkpoint.open(folder))
