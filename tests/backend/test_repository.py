"""Model directories: what is written, when it is refused, that it is there at once or not at all."""

import json
import os

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from backend import repository
from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError


def read(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def parameters(config):
    return {key: value.string_value for key, value in config.parameters.items()}


def test_tasks_are_the_templates():
    assert "generate" in repository.tasks()


def test_a_directory_is_the_template_under_another_name(tmp_path):
    given = {"model": '/models/a "b"\\ü', "tensor_parallel": "2"}
    folder = repository.write(tmp_path / "new" / "repo", "generate", "opt67b", given)
    template = repository._templates() / "generate"
    written, original = read(folder), read(template)
    assert folder == tmp_path / "new" / "repo" / "opt67b"
    assert written.name == "opt67b"
    assert parameters(written) == parameters(original) | given
    assert written.input == original.input and written.output == original.output
    assert written.model_transaction_policy.decoupled
    assert (folder / "1" / "model.py").read_bytes() == (template / "1" / "model.py").read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["opt67b"]
    assert folder.stat().st_mode & 0o555 == 0o555  # a server of another user can read it


def test_what_is_written_is_what_the_engine_reads(tmp_path):
    config = read(repository.write(tmp_path, "generate", "m", {"model": "/m", "prefix_cache": "false"}))
    found = EngineConfig.from_parameters(parameters(config))
    assert (found.model, found.prefix_cache) == ("/m", False)


@pytest.mark.parametrize(
    ("task", "most", "rows"),
    [("generate", "100", 100), ("generate", "4", 64), ("generate", str(2**40), 2**31 - 1), ("qa", "1000", 64)],
)
def test_triton_lets_as_many_prompts_through_as_the_model_takes(tmp_path, task, most, rows):
    """Not fewer than the template: the model says itself which limit is passed."""
    assert read(repository.write(tmp_path, task, "m", {"model": "/m", "max_prompts": most})).max_batch_size == rows


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a b", "é", "a\n", "a\0", "x" * 129, "a\\b"]
)
def test_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(InvalidInput, match="name"):
        repository.write(tmp_path / "r", "generate", name, {"model": "/m"})
    with pytest.raises(InvalidInput, match="name"):
        repository.remove(tmp_path / "r", name)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["a", "opt-6.7b", "A_1", "x" * 128])
def test_names_that_are_fine(tmp_path, name):
    assert repository.write(tmp_path, "generate", name, {"model": "/m"}).is_dir()


@pytest.mark.parametrize(
    ("given", "named"), [({"modle": "x"}, "modle"), ({"model": ""}, "model"), ({"dtype": "int3"}, "dtype")]
)
def test_parameters_are_checked_before_anything_is_written(tmp_path, given, named):
    with pytest.raises(LoadError, match=named):
        repository.write(tmp_path, "generate", "m", given)
    assert not list(tmp_path.iterdir())


def test_an_unknown_task(tmp_path):
    with pytest.raises(InvalidInput, match=r"'nonsense'; available: .*generate"):
        repository.write(tmp_path, "nonsense", "m", {"model": "/m"})


def test_its_own_directory_is_replaced_whole(tmp_path):
    folder = repository.write(tmp_path, "generate", "m", {"model": "/old", "dtype": "float32"})
    (folder / "left").write_text("over")
    repository.write(tmp_path, "generate", "m", {"model": "/new"})
    assert parameters(read(folder)) == {"model": "/new"}
    assert not (folder / "left").exists()
    assert repository.origin(tmp_path, "m") == repository.Origin("generate", {"model": "/new"})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_strangers_directory_stays_unless_asked(tmp_path):
    stranger = tmp_path / "m"
    stranger.mkdir()
    (stranger / "config.pbtxt").write_text("mine")
    with pytest.raises(InvalidInput, match="not written by tritonspeed"):
        repository.write(tmp_path, "generate", "m", {"model": "/m"})
    with pytest.raises(InvalidInput, match="stays"):
        repository.remove(tmp_path, "m")
    assert (stranger / "config.pbtxt").read_text() == "mine"
    repository.write(tmp_path, "generate", "m", {"model": "/m"}, replace=True)
    assert read(stranger).name == "m"


def test_a_link_is_never_followed(tmp_path):
    elsewhere = repository.write(tmp_path / "elsewhere", "generate", "m", {"model": "/m"})
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "m").symlink_to(elsewhere)
    with pytest.raises(InvalidInput, match="link"):
        repository.write(tmp_path / "r", "generate", "m", {"model": "/x"}, replace=True)
    with pytest.raises(InvalidInput, match="link"):
        repository.remove(tmp_path / "r", "m")
    assert elsewhere.is_dir()


def test_remove(tmp_path):
    repository.write(tmp_path, "generate", "m", {"model": "/m"})
    repository.remove(tmp_path, "m")
    assert not list(tmp_path.iterdir())
    assert repository.origin(tmp_path, "m") is None
    with pytest.raises(InvalidInput):
        repository.remove(tmp_path, "m")


@pytest.mark.parametrize("mark", ["", "[]", "{}", json.dumps({"task": "generate"})])
def test_a_broken_mark_is_none(tmp_path, mark):
    folder = repository.write(tmp_path, "generate", "m", {"model": "/m"})
    (folder / repository.MARK).write_text(mark)
    assert repository.origin(tmp_path, "m") is None


@pytest.mark.parametrize("end", [OSError, KeyboardInterrupt])
def test_a_rename_that_fails_keeps_the_old_one(tmp_path, monkeypatch, end):
    folder = repository.write(tmp_path, "generate", "m", {"model": "/old"})
    rename = os.rename

    def broken(source, target):
        if str(source).endswith("new"):
            raise end("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(end, match="no"):
        repository.write(tmp_path, "generate", "m", {"model": "/new"})
    assert parameters(read(folder)) == {"model": "/old"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
