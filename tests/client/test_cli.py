"""The command line against a fake server."""

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from fake_triton import Failure, row, until

from client.cli import main, parser
from client.sampling import KEYS


@pytest.fixture
def run(server, capsys):
    def run(*arguments):
        command, *rest = arguments
        status = main([command, "--host", "127.0.0.1", "--port", str(server.port), *rest])
        return status, *capsys.readouterr()

    return run


def give(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_generate_streams(server, run):
    assert run("generate", "hello world") == (0, "HELLO WORLD\n", "")
    assert server.requests[0].stream
    assert server.requests[0].model == "generate"


def test_several_prompts_and_a_name(server, run):
    assert run("generate", "--name", "m", "a", "b") == (0, "A\nB\n", "")
    assert [received.model for received in server.requests] == ["m", "m"]


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input(server, run, monkeypatch, arguments):
    give(monkeypatch, "é two\n".encode())
    assert run("generate", *arguments) == (0, "É TWO\n", "")
    assert server.requests[0].prompt == "é two"


def test_standard_input_must_be_text(run, monkeypatch):
    give(monkeypatch, b"\xff")
    status, out, err = run("generate")
    assert (status, out) == (1, "")
    assert "not UTF-8" in err


def test_json_lines(run):
    status, out, _ = run("generate", "--json", "--n", "2", "é")
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"text": "É", "finish_reason": "stop", "num_input_tokens": 3, "num_output_tokens": 1,
         "cumulative_logprob": None, "logprobs": None, "index": index} for index in (0, 1)
    ]  # fmt: skip
    assert "É" in out


def test_samples_without_json(run):
    assert run("generate", "--n", "2", "a") == (0, "A\nA\n", "")


def test_chat(server, run):
    server.script = lambda received: iter([row("hi", "stop")])
    assert run("generate", "--chat", "hello")[:2] == (0, "hi\n")
    assert json.loads(server.requests[0].inputs["messages"].item()) == [{"role": "user", "content": "hello"}]


def test_sampling_flags(server, run):
    flags = ["--max-tokens", "5", "--temperature", "0", "--stop", "a", "--stop", "b", "--ignore-eos"]
    assert run("generate", *flags, "--stop-token-ids", "7", "--no-do-sample", "--priority", "1", "x")[0] == 0
    inputs = server.requests[0].inputs
    assert inputs["max_tokens"].item() == 5
    assert inputs["temperature"].item() == 0
    assert inputs["stop_words"].tolist() == [[b"a", b"b"]]
    assert inputs["stop_token_ids"].tolist() == [[7]]
    assert inputs["ignore_eos"].item() is True
    assert json.loads(inputs["sampling_parameters"].item()) == {"do_sample": False, "priority": 1}


def test_each_key_with_help_has_a_flag():
    help_text = next(iter(parser()._subparsers._group_actions)).choices["generate"].format_help()
    assert all(
        f"--{key.name.replace('_', '-')} " in help_text for key in KEYS.values() if key.help and key.kind != "bool"
    )


def test_an_error_is_one_line(server, run):
    def script(received):
        raise Failure("INVALID_ARGUMENT", "InvalidInput: two\nlines")
        yield

    server.script = script
    status, out, err = run("generate", "x")
    assert (status, out) == (1, "")
    assert err.startswith("error: two lines")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["generate", "--max-tokens", "many", "x"], ["nonsense"], []])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_headers(server, run):
    assert run("generate", "--header", "Key=v=w", "x")[0] == 0
    assert server.requests[0].metadata["key"] == "v=w"
    assert "--header takes" in run("generate", "--header", "nothing", "x")[2]


def test_list(server, run):
    server.ready = {"b": ("UNAVAILABLE", "Internal: LoadError: no\nroom At:\n  /x.py(3): f\n"), "a": ("READY", "")}
    assert run("list") == (0, "a                        READY\nb                        UNAVAILABLE  no room\n", "")
    assert json.loads(run("list", "--json")[1].splitlines()[0]) == {
        "name": "a", "version": "1", "state": "READY", "reason": "",
    }  # fmt: skip


def test_serve_hands_everything_on(monkeypatch):
    import backend.server

    monkeypatch.setattr(backend.server, "main", lambda arguments: (print(arguments), 7)[1])
    assert main(["serve", "--model", "x", "--help"]) == 7


def test_serve_without_the_servers_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "backend.server", None)
    assert main(["serve"]) == 1
    told = capsys.readouterr().err
    assert "serving needs the server's packages" in told and "pip install '.[server]'" in told


def start(server, *arguments, **options):
    command = [sys.executable, "-m", "client.cli", "generate", "--host", "127.0.0.1", "--port", str(server.port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"env": os.environ | {"PYTHONFAULTHANDLER": "1"}, "preexec_fn": interruptible, **options}
    return subprocess.Popen([*command, *arguments], **pipes, **options)


def interruptible():
    """Also where these tests run in the background: a shell has such programs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def endless(received):
    while not received.gone.wait(0.01):
        yield row("more ")


def test_ctrl_c_cancels_the_request(server):
    server.script = endless
    with start(server, "x") as process:
        assert process.stdout.read(5) == "more "
        _, err = interrupted(process)
    assert (process.returncode, err) == (130, "")
    assert until(server.requests[0].gone.is_set)


def interrupted(process):
    """Ctrl-C, and again: gRPC's own code may swallow the first (seen in one run of many)."""
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=20)
    process.send_signal(signal.SIGABRT)  # faulthandler tells where each thread is
    raise AssertionError(process.communicate(timeout=20)[1])


def test_a_reader_that_leaves_ends_it_quietly(server):
    server.script = endless
    with start(server, "x") as process:
        assert process.stdout.read(5) == "more "
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
    assert until(server.requests[0].gone.is_set)


def test_text_comes_before_the_end(server):
    def script(received):
        yield row("first")
        received.gone.wait(10)

    server.script = script
    with start(server, "x") as process:
        assert os.read(process.stdout.fileno(), 5) == b"first"
        process.kill()
