"""deploy, undeploy and models against a fake server's repository calls."""

import errno
import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_encoders
from fake_triton import FakeTriton, serving
from safetensors.numpy import save_file

from backend import repository
from client import Embed, deploy, local, models, undeploy
from client.cli import main
from client.control import reason
from client.errors import DeadlineExceeded, Error, InvalidInput, ServerError, Unavailable


@pytest.fixture
def model(tmp_path):
    """A checkpoint that can be checked: two layers of llama, no tokenizer."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 64,
        "intermediate_size": 32, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (8, 16)}
    shapes |= {
        f"model.layers.0.self_attn.{name}_proj.weight": (rows, 16)
        for name, rows in zip("qkvo", (16, 8, 8, 16), strict=True)
    }
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A fake server whose launcher has announced it."""
    monkeypatch.setenv("TRITONSPEED_RUN", str(tmp_path / "run"))
    (tmp_path / "models").mkdir()
    with serving(repository=tmp_path / "models") as fake:
        local.announce(fake.port, 1, tmp_path / "models", explicit=True)
        yield fake


def at(server):
    return {"host": "127.0.0.1", "port": server.port}


def test_deploy_checks_writes_loads_and_returns_the_pipeline(server, model):
    told = []
    with deploy(model, name="opt", max_model_len=32, prefix_cache=False, **at(server), tell=told.append) as pipe:
        assert pipe("hi").text == "HI"
    assert server.requests[0].model == "opt"
    assert server.calls == [("load", "opt")]
    made_from = repository.origin(server.repository, "opt")
    assert made_from == repository.Origin(
        "generate",
        {"model": str(model), "tensor_parallel": "1", "max_model_len": "32", "prefix_cache": "false"},
    )
    assert any("llama" in line for line in told)


def test_another_task_is_checked_by_itself(server, tmp_path, capsys):
    where = ["--host", "127.0.0.1", "--port", str(server.port)]
    folder = tiny_encoders.write(tmp_path / "bert")
    assert main(["deploy", str(folder), "--task", "embed", "--name", "vectors", *where]) == 0
    assert f"try: tritonspeed embed --name vectors --port {server.port} 'Hello'" in capsys.readouterr().err
    assert repository.origin(server.repository, "vectors").task == "embed"
    with deploy(folder, "embed", **at(server)) as pipe:
        assert isinstance(pipe, Embed)
    with pytest.raises(InvalidInput, match="3 ranks"):
        deploy(folder, "embed", name="b", tensor_parallel=3, **at(server))
    assert repository.origin(server.repository, "b") is None


def test_the_repository_may_be_named(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONSPEED_RUN", str(tmp_path / "run"))
    with serving(repository=tmp_path / "models") as fake:
        with pytest.raises(InvalidInput, match="repository="):
            deploy(model, **at(fake))
        deploy(model, repository=tmp_path / "models", **at(fake)).close()
        assert fake.ready == {"generate": ("READY", "")}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tensor_parallel": 3}, "2 key/value heads"), ({"modle": 1}, "modle"), ({"dtype": "int3"}, "dtype"),
        ({"max_model_len": 65}, "64"), ({"name": "../x"}, "name"), ({"task": "translate"}, "available: generate"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_anything_is_written(server, model, options, named):
    with pytest.raises(InvalidInput, match=named):
        deploy(model, **options, **at(server))
    assert not server.calls
    assert not list(server.repository.iterdir())


def test_no_such_model(server, tmp_path):
    with pytest.raises(InvalidInput, match="no such model folder"):
        deploy(tmp_path / "nowhere", **at(server))


def test_a_failed_load_says_why_and_leaves_nothing(server, model):
    server.load_failure = "version 1 is at UNAVAILABLE state: Internal: LoadError: rank 0: out of memory;\n"
    with pytest.raises(InvalidInput, match=r"'generate' could not be loaded: rank 0: out of memory$"):
        deploy(model, **at(server))
    assert not list(server.repository.iterdir())
    server.load_failure = "no version is available"
    with pytest.raises(ServerError, match="no version is available"):
        deploy(model, **at(server))


def test_a_failed_reload_brings_the_old_directory_back(server, model):
    deploy(model, **at(server)).close()
    before = repository.origin(server.repository, "generate")
    server.load_failure = "version 1 is at UNAVAILABLE state: Internal: LoadError: no;"
    with pytest.raises(InvalidInput):
        deploy(model, dtype="float16", **at(server))
    assert repository.origin(server.repository, "generate") == before


def test_a_strangers_directory_stays(server, model):
    (server.repository / "generate").mkdir()
    with pytest.raises(InvalidInput, match="not written by tritonspeed"):
        deploy(model, **at(server))
    deploy(model, replace=True, **at(server)).close()
    assert repository.origin(server.repository, "generate")


def test_a_strangers_directory_survives_a_failed_replacement(server, model):
    theirs = strangers(server)
    server.load_failure = "version 1 is at UNAVAILABLE state: Internal: LoadError: no;"
    with pytest.raises(InvalidInput, match="no"):
        deploy(model, replace=True, **at(server))
    assert theirs.read_text() == "theirs"
    assert [folder.name for folder in server.repository.iterdir()] == ["generate"]


@pytest.fixture
def full(monkeypatch):
    """A disk that takes no more files, as a write of their content tells it: without a path."""

    def fill(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(repository, "_fill", fill)


def strangers(server):
    theirs = server.repository / "generate" / "1" / "weights.bin"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    return theirs


def test_a_strangers_directory_survives_a_failed_write(server, model, full):
    theirs = strangers(server)
    with pytest.raises(InvalidInput, match=f"{server.repository}: No space left on device"):
        deploy(model, replace=True, **at(server))
    assert theirs.read_text() == "theirs"
    assert [folder.name for folder in server.repository.iterdir()] == ["generate"]


def test_its_own_directory_survives_a_failed_write(server, model, monkeypatch, request):
    deploy(model, **at(server)).close()
    before = repository.origin(server.repository, "generate")
    request.getfixturevalue("full")
    with pytest.raises(InvalidInput, match="No space left"):
        deploy(model, dtype="float16", **at(server))
    assert repository.origin(server.repository, "generate") == before


def test_what_a_replacement_that_was_cut_off_put_aside_stays(server, model):
    aside = server.repository / ".generate.before"
    (aside / "1").mkdir(parents=True)
    deploy(model, **at(server)).close()
    undeploy("generate", **at(server))
    theirs = strangers(server)
    with pytest.raises(InvalidInput, match=f"{aside} holds"):
        deploy(model, replace=True, **at(server))
    assert theirs.read_text() == "theirs" and (aside / "1").is_dir()


def test_a_repository_that_nobody_can_write_to(server, model, monkeypatch, capsys):
    def read_only(*given, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(server.repository / "x"))

    deploy(model, **at(server)).close()
    monkeypatch.setattr(repository.tempfile, "TemporaryDirectory", read_only)
    where = ["--host", "127.0.0.1", "--port", str(server.port)]
    said = f"error: {server.repository / 'x'}: Read-only file system\n"
    for command in (["deploy", str(model)], ["undeploy", "generate"]):
        assert main([*command, *where]) == 1
        assert capsys.readouterr().err.endswith(said)


def test_a_server_is_not_started_on_a_folder_that_cannot_be(model, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **options: pytest.fail("started"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=f"{tmp_path / 'file'}"):
        deploy(model, host="127.0.0.1", port=nobody(), repository=tmp_path / "file")


def test_a_server_that_takes_no_deployments(server, model):
    local.announce(server.port, 1, server.repository, explicit=False)
    with pytest.raises(InvalidInput, match=r"scripts/serve --explicit"):
        deploy(model, **at(server))
    assert not list(server.repository.iterdir())
    (local.folder() / f"{server.port}.json").unlink()
    server.explicit = False
    with pytest.raises(InvalidInput, match=r"scripts/serve --explicit"):
        deploy(model, repository=server.repository, **at(server))
    assert not list(server.repository.iterdir())


def test_another_folder_than_the_servers(server, model, tmp_path):
    with pytest.raises(InvalidInput, match="does not find it"):
        deploy(model, repository=tmp_path / "other", **at(server))
    assert not list((tmp_path / "other").iterdir())


def test_a_load_that_takes_too_long_is_taken_back(server, model):
    server.state_after_load = "LOADING"
    with pytest.raises(DeadlineExceeded, match="timeout="):
        deploy(model, timeout=0.5, **at(server))
    assert ("unload", "generate") in server.calls
    assert not list(server.repository.iterdir())


def nobody():
    fake = FakeTriton()
    fake.stop()
    return fake.port


def test_a_server_is_started_where_none_is(server, model, tmp_path, monkeypatch):
    port, started, other = nobody(), [], []

    def launch(command, **options):
        started.append(command)
        other.append(FakeTriton(port=port, repository=tmp_path / "models"))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", launch)
    deploy(model, host="127.0.0.1", port=port, repository=tmp_path / "models").close()
    other[0].stop()
    assert other[0].calls == [("load", "generate")]
    command = started[0]
    assert command[:4] == [sys.executable, "-P", "-m", "backend.server"]
    assert {"--explicit", "--detach"} < set(command)
    assert command[command.index("--port") + 1] == str(port)
    assert command[command.index("--repository") + 1] == str(tmp_path / "models")


def test_a_server_that_does_not_start(model, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITONSPEED_RUN", str(tmp_path / "run"))
    failed = subprocess.CompletedProcess([], 1, "", "starting\nerror: no tritonserver\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    with pytest.raises(ServerError, match="no tritonserver"):
        deploy(model, host="127.0.0.1", port=nobody())


def test_no_server_is_started_elsewhere(model, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **options: pytest.fail("started"))
    with pytest.raises(Unavailable, match="--explicit` there"):
        deploy(model, host="localhost.invalid", port=1)


def test_without_the_servers_packages(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "backend"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "backend.errors", None)
    with pytest.raises(InvalidInput, match=r"deploying needs .*pip install '\.\[server\]' in tritonspeed's clone"):
        deploy("x")


def test_undeploy_unloads_and_removes_what_deploy_wrote(server, model):
    deploy(model, **at(server)).close()
    undeploy("generate", **at(server))
    assert server.calls[-1] != ("load", "generate")
    assert ("unload", "generate") in server.calls
    assert not list(server.repository.iterdir())


def test_undeploy_keeps_a_strangers_directory(server):
    (server.repository / "m").mkdir()
    server.ready["m"] = ("READY", "")
    undeploy("m", **at(server))
    assert (server.repository / "m").is_dir()
    assert server.ready["m"][0] == "UNAVAILABLE"


def test_undeploy_of_what_is_not_there(server):
    server.ready["m"] = ("READY", "")
    with pytest.raises(InvalidInput, match=r"'x' at .*; there are: m"):
        undeploy("x", **at(server))


def test_undeploy_waits_for_the_requests_that_run(server):
    server.ready["m"] = ("READY", "")
    server.state_after_unload = "UNLOADING"
    with pytest.raises(DeadlineExceeded, match="not unloaded"):
        undeploy("m", timeout=0.3, **at(server))


def test_models(server):
    server.ready = {"b": ("READY", ""), "a": ("UNAVAILABLE", "Internal: ValueError: x At:\n y")}
    assert [(model.name, model.state, model.reason) for model in models(**at(server))] == [
        ("a", "UNAVAILABLE", "ValueError: x"),
        ("b", "READY", ""),
    ]
    with pytest.raises(Error):
        models(host="127.0.0.1", port=nobody())


def test_the_command_line(server, model, capsys):
    where = ["--host", "127.0.0.1", "--port", str(server.port)]
    assert main(["deploy", str(model), "--name", "m", "--set", "num_blocks=8", "--max-model-len", "32", *where]) == 0
    assert "m: ready; try: tritonspeed generate --name m" in capsys.readouterr().err
    assert repository.origin(server.repository, "m").parameters["num_blocks"] == "8"
    assert main(["undeploy", "m", *where]) == 0
    assert main(["undeploy", "x", *where]) == 1
    for wrong in ("dtype=float32", "novalue", "modle=x"):
        assert main(["deploy", str(model), "--set", wrong, *where]) == 1
    err = capsys.readouterr().err
    assert "--set dtype" in err and "--set takes" in err and "modle" in err


@pytest.mark.parametrize("name", sorted(inspect.signature(deploy).parameters.keys() - {"parameters"}))
def test_parameters_do_not_collide_with_what_deploy_takes(server, model, capsys, name):
    line = ["deploy", str(model), "--host", "127.0.0.1", "--port", str(server.port), "--set", f"{name}=1"]
    assert main(line) == 1
    assert capsys.readouterr().err == f"error: --set {name}: that has an option of its own\n"
    assert not server.calls


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (
            "load failed for model 'bad': version 1 is at UNAVAILABLE state: Internal: LoadError: 3 does not divide 8"
            "\n\nAt:\n  /repo/bad/1/model.py(3): initialize\n;",
            "3 does not divide 8",
        ),
        ("failed to load 'x', no version is available", "no version is available"),
        ("Internal: ModuleNotFoundError: No module 'x'\n\nAt:\n  x", "ModuleNotFoundError: No module 'x'"),
        ("unloaded", "unloaded"),
        ("", ""),
    ],
)  # fmt: skip
def test_the_reason_in_what_triton_2_51_says(said, why):
    assert reason(said) == why
