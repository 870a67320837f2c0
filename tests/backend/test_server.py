"""The launcher: with a stand-in for tritonserver, and with a real one and a model of a few lines."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest

from backend import repository, server
from backend.errors import LoadError
from backend.launcher import health, leftovers, options, probe, tritonserver
from backend.launcher.greeting import local_commands
from backend.launcher.log import Log
from backend.launcher.output import Output, telling
from backend.launcher.ports import require_free
from backend.launcher.tritonserver import Installation, Options, Ports
from client import cli
from client.commands import COMMANDS

FAKES = Path(__file__).resolve().parents[1] / "fakes"
REPOSITORY = FAKES / "repository"
ANY_PORT = ["--port=0", "--http-port=0", "--metrics-port=0"]  # and so the health port
LOCAL = Ports("127.0.0.1", 1, 2, 3)
SAFE = {"NVIDIA_TRITON_SERVER_VERSION": "26.10"}
ANYWHERE = Ports("0.0.0.0", 1, 2, 3)


class Launcher:
    """A launcher in a process of its own, and all that it said so far."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "backend.server", *ANY_PORT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.said = ""

    def until(self, text):
        for line in self.process.stderr:
            self.said += line
            if text in line:
                return line
        raise AssertionError(f"{text!r} never came:\n{self.said}")

    def end(self, timeout=30):
        """The exit status, once everything has been read."""
        self.said += self.process.communicate(timeout=timeout)[1]
        return self.process.returncode


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONSPEED_RUN", str(tmp_path / "run"))
    with contextlib.ExitStack() as stack:

        def start(*arguments, **environment):
            launcher = Launcher(*arguments, **environment)
            stack.callback(launcher.process.stderr.close)
            stack.callback(launcher.process.wait)
            stack.callback(launcher.process.kill)
            return launcher

        yield start


@pytest.fixture
def fake(launch, tmp_path):
    """Starts a launcher over the stand-in; the stand-in's own notes are at fake.log."""

    def start(mode, *arguments, **environment):
        given = {"TRITONSERVER": str(FAKES / "fake_tritonserver.py"), "FAKE": mode, "FAKE_LOG": str(start.log)}
        return launch(f"--repository={REPOSITORY}", *arguments, **given, **environment)

    start.log = tmp_path / "fake.log"
    return start


def started(fake):
    """Process ids of the stand-in and of its child."""
    return [int(pid) for pid in fake.log.read_text().split("\n")[0].split()]


def alive(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def gone(pids, seconds=10):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def eventually(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def assert_nothing_left(launcher, pids, run):
    assert gone(pids)
    assert [path.name for path in run.iterdir() if path.suffix != ".log"] == []
    assert list(Path("/dev/shm").glob(f"tritonspeed_{launcher.process.pid}_*")) == []


# --- with the stand-in


def test_a_server_that_listens_and_does_not_answer_is_deaf(tmp_path):
    output = Output(Log(tmp_path / "log"), verbose=False, show=lambda line: None)
    output.read(["loading"])
    assert not output.deaf(0)
    output.read(['I1123 19:14:26.377188 26549 http_server.cc:4713] "Started HTTPService at 127.0.0.1:45939"'])
    assert output.deaf(0) and not output.deaf(60)


@pytest.mark.parametrize(("mode", "starts"), [("abort-once", 2), ("lost-once", 2), ("abort", 2)])
def test_a_server_that_comes_to_nothing_is_started_once_more(mode, starts, fake, tmp_path):
    """As 2.51 may where a model fails to load; a second time is the last."""
    launcher = fake(mode, FAKE_STARTS=str(tmp_path / "starts"))
    launcher.until("starting it once more")
    if mode != "abort":
        launcher.until("ready after")
        launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == (1 if mode == "abort" else 0)
    assert ("did not start (signal 6)" in launcher.said) == (mode == "abort")
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert_nothing_left(launcher, started(fake), tmp_path / "run")


def test_ready_tells_what_to_try_and_ctrl_c_leaves_nothing(fake, tmp_path):
    launcher = fake("ready")
    ready = launcher.until("ready after")
    grpc = re.search(r"127\.0\.0\.1:(\d+) \(gRPC\)", ready)[1]
    launcher.until("tritonspeed generate")
    launcher.until("curl")
    launcher.until("from client import pipeline")
    launcher.until("Ctrl-C")
    assert "generate | rank 0 | loaded 40 %" in launcher.said
    assert "loading: generate" not in launcher.said
    state = json.loads((tmp_path / "run" / f"{grpc}.json").read_text())
    assert (state["pid"], state["repository"]) == (launcher.process.pid, str(REPOSITORY))
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == 0
    assert_nothing_left(launcher, started(fake), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_verbose_shows_everything(fake):
    launcher = fake("ready", "--verbose")
    launcher.until("loading: generate")


def test_working_directory_is_empty(fake):
    fake("ready").until("ready after")
    assert list(Path(fake.log.read_text().split("\n")[1]).iterdir()) == []


def test_health_is_told_over_http_and_to_the_probe(fake):
    launcher = fake("sick")
    ready = launcher.until("ready after")
    grpc, port = (int(re.search(rf":?(\d+) \({what}\)", ready)[1]) for what in ("gRPC", "health"))
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
    with raised.value as answer:
        assert (answer.code, answer.read()) == (503, b"model generate: down: rank 0 was killed\n")
    assert probe.trouble(grpc) == "model generate: down: rank 0 was killed"
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
    raised.value.close()
    assert raised.value.code == 404


def test_a_server_without_trouble_is_well(fake):
    launcher = fake("ready")
    ready = launcher.until("ready after")
    port = int(re.search(r"(\d+) \(health\)", ready)[1])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        assert (answer.status, answer.read()) == (200, b"ok\n")
    assert probe.trouble(int(re.search(r":(\d+) \(gRPC\)", ready)[1])) is None


def test_the_log_is_bounded_and_goes_with_the_server(fake, tmp_path):
    launcher = fake("loud", "--log-mib=1", "--log-files=2")
    launcher.until("ready after")
    logs = sorted((tmp_path / "run").glob("*.log"))
    assert re.fullmatch(r"(\d+)\.1\.log \1\.log", " ".join(log.name for log in logs))
    eventually(lambda: logs[1].read_text().endswith(f" {(3 << 10) - 1}\n"))
    assert max(log.stat().st_size for log in logs) <= 1 << 20
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == 0
    assert not list((tmp_path / "run").iterdir())


def test_temporary_files_go_with_the_server(fake, tmp_path):
    launcher = fake("ready")
    launcher.until("ready after")
    (process,) = (psutil.Process(pid) for pid in started(fake)[:1])
    folder = Path(process.environ()["TMPDIR"])
    assert folder.parent.name == f"server-{launcher.process.pid}"
    (folder / "left").mkdir()
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == 0
    assert not folder.exists()


def test_failed_load_is_one_line_and_status_1(fake, tmp_path):
    launcher = fake("broken")
    assert launcher.end() == 1
    assert "error: generate failed to load: LoadError: no such model: /x (all it said:" in launcher.said
    assert "initialize" not in launcher.said
    assert_nothing_left(launcher, started(fake), tmp_path / "run")
    (log,) = (tmp_path / "run").glob("*.log")
    assert "initialize" in log.read_text()


def test_a_server_that_dies_is_reported(fake, tmp_path):
    launcher = fake("crash")
    assert launcher.end() == 1
    assert "signal 9" in launcher.said
    assert_nothing_left(launcher, started(fake), tmp_path / "run")


def test_a_server_that_does_not_stop_is_killed_at_the_limit(fake, tmp_path):
    launcher = fake("deaf", "--drain-seconds=0")
    launcher.until("Ctrl-C")
    launcher.process.terminate()
    assert launcher.end() == 0
    assert "without waiting any longer" in launcher.said
    assert_nothing_left(launcher, started(fake), tmp_path / "run")


def test_a_second_signal_ends_it_at_once(fake, tmp_path):
    launcher = fake("deaf", "--drain-seconds=3600")
    launcher.until("Ctrl-C")
    launcher.process.send_signal(signal.SIGINT)
    launcher.until("stopping")
    assert launcher.process.poll() is None
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.end() == 0
    assert_nothing_left(launcher, started(fake), tmp_path / "run")


def test_a_killed_launcher_takes_the_server_with_it(fake, tmp_path):
    launcher = fake("ready")
    launcher.until("ready after")
    launcher.process.kill()
    assert gone(started(fake))


def test_the_next_start_clears_what_a_killed_launcher_left(fake, tmp_path):
    first = fake("ready")
    first.until("ready after")
    assert list(Path("/dev/shm").glob(f"tritonspeed_{first.process.pid}_*"))
    first.process.kill()
    first.process.wait()
    assert gone(started(fake))  # from here on any launcher's start may clear it, another test's too
    second = fake("ready")
    second.until("ready after")
    assert not list(Path("/dev/shm").glob(f"tritonspeed_{first.process.pid}_*"))
    assert [path.name for path in (tmp_path / "run").glob("server-*")] == [f"server-{second.process.pid}"]


def test_detach_returns_when_ready_and_leaves_it_running(fake, tmp_path):
    launcher = fake("ready", "--detach")
    assert launcher.end() == 0
    pid = int(re.search(r"as process (\d+)", launcher.said)[1])
    assert "ready after" in launcher.said and alive(pid)
    os.kill(pid, signal.SIGTERM)
    assert gone([pid, *started(fake)])


def test_detach_reports_a_failure(fake):
    launcher = fake("broken", "--detach")
    assert launcher.end() == 1
    assert "no such model: /x" in launcher.said


def test_bound_elsewhere_the_servers_own_apis_need_a_key(fake):
    launcher = fake("ready", "--host=0.0.0.0", TRITONSPEED_ADMIN_KEY="secret", **SAFE)
    launcher.until("ready after")
    given = fake.log.read_text()
    protected = "shared-memory,model-repository,model-config,trace,logging:admin-key=secret"
    assert f"--grpc-restricted-protocol={protected}" in given
    assert f"--http-restricted-api={protected}" in given


def test_a_key_is_made_up_and_told(fake):
    launcher = fake("ready", "--host=0.0.0.0", **SAFE)
    key = launcher.until("admin-key:").split()[-1]
    launcher.until("ready after")
    assert len(key) > 16 and f"admin-key={key}" in fake.log.read_text()


# --- what costs no process


def test_a_taken_port_names_its_option(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert server.main([f"--repository={REPOSITORY}", *ANY_PORT, f"--http-port={port}"]) == 1
    assert (
        f"error: port {port} (--http-port) on 127.0.0.1 cannot be used: address already in use"
        in capsys.readouterr().err
    )


def test_free_ports_differ():
    ports = require_free("127.0.0.1", {"a": 0, "b": 0, "c": 0})
    assert len(set(ports.values())) == 3


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_impossible_port_is_refused(port):
    with pytest.raises(LoadError, match=f"port {port} "):
        require_free("127.0.0.1", {"--port": port})


def bundled(tmp_path):
    return Installation(tmp_path / "bin" / "tritonserver", None, tmp_path)


def test_the_pypi_server_stays_on_loopback(tmp_path):
    tritonserver.check_host(bundled(tmp_path), LOCAL, {})
    with pytest.raises(LoadError, match="security holes: loopback only"):
        tritonserver.check_host(bundled(tmp_path), ANYWHERE, {})


def test_an_unknown_release_stays_on_loopback():
    installation = Installation(Path("/opt/tritonserver/bin/tritonserver"), None, None)
    tritonserver.check_host(installation, LOCAL, {})
    with pytest.raises(LoadError, match="does not say which Triton this is"):
        tritonserver.check_host(installation, ANYWHERE, {})


@pytest.mark.parametrize(("release", "allowed"), [("26.06", False), ("25.10", False), ("26.07", True), ("26.10", True)])
def test_an_old_release_stays_on_loopback(release, allowed):
    installation = Installation(Path("/opt/tritonserver/bin/tritonserver"), None, None)
    given = {"NVIDIA_TRITON_SERVER_VERSION": release}
    with contextlib.nullcontext() if allowed else pytest.raises(LoadError, match=re.escape(release)):
        tritonserver.check_host(installation, ANYWHERE, given)


def test_tritonserver_is_taken_from_the_environment_then_path_then_the_wheel(tmp_path):
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert tritonserver.find({"TRITONSERVER": str(program)}).executable == program
    assert tritonserver.find({"PATH": str(tmp_path)}).executable == program
    with pytest.raises(LoadError, match="TRITONSERVER names no executable"):
        tritonserver.find({"TRITONSERVER": str(tmp_path / "none")})
    given = tritonserver.find({"TRITONSERVER": str(program), "TRITON_BACKENDS": "/b"})
    assert tritonserver.link_backends(given, tmp_path / "unused") == Path("/b")


def test_backends_are_links_with_this_pythons_stub(tmp_path):
    wheel = tmp_path / "wheel"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in (f"python_backend_stubs/{version}/triton_python_backend_stub", "backends/python/libtriton_python.so"):
        (wheel / name).parent.mkdir(parents=True)
        (wheel / name).write_text(name)
    folder = tritonserver.link_backends(bundled(wheel), tmp_path / "backends")
    links = sorted((folder / "python").iterdir())
    assert [link.name for link in links] == ["libtriton_python.so", "triton_python_backend_stub"]
    assert all(link.is_symlink() and link.exists() for link in links)


def test_a_python_without_stub_is_refused(tmp_path):
    with pytest.raises(LoadError, match="no stub for Python"):
        tritonserver.link_backends(bundled(tmp_path), tmp_path / "backends")


def test_command_line(tmp_path):
    line = tritonserver.command(Path("/t"), tmp_path, None, LOCAL, Options())
    assert "--disable-auto-complete-config" in line and "--grpc-address=127.0.0.1" in line
    assert not any("restricted" in word or "model-control" in word for word in line)
    empty = tritonserver.command(Path("/t"), tmp_path, None, LOCAL, Options(explicit=True))
    assert "--model-control-mode=explicit" in empty and "--load-model=*" not in empty
    (tmp_path / "generate").mkdir()
    assert "--load-model=*" in tritonserver.command(Path("/t"), tmp_path, None, LOCAL, Options(explicit=True))


def test_stubs_get_this_python_first_on_path(tmp_path):
    given = tritonserver.environment(tmp_path, tmp_path / "tmp", {"PATH": "/usr/bin", "OMP_NUM_THREADS": "7"})
    assert given["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert given["TRITONSPEED_PYTHON"] == sys.executable
    assert given["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("known", "shared", "before", "after"),
    [
        ("libpython3.so", 1, None, None),
        (None, 0, None, None),
        (None, 1, None, "/opt/python/lib"),
        (None, 1, "/a:/b", "/a:/b:/opt/python/lib"),
        ("libpython3.so", 1, "/a", "/a"),
    ],
)
def test_stubs_find_a_libpython_that_the_system_does_not_know(tmp_path, monkeypatch, known, shared, before, after):
    variables = {"Py_ENABLE_SHARED": shared, "LIBDIR": "/opt/python/lib"}
    monkeypatch.setattr(tritonserver, "find_library", lambda name: known)
    monkeypatch.setattr(tritonserver.sysconfig, "get_config_var", variables.get)
    inherited = {"LD_LIBRARY_PATH": before} if before else {}
    assert tritonserver.environment(tmp_path, tmp_path / "tmp", inherited).get("LD_LIBRARY_PATH") == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "tensor_paralel=2"], "unknown parameter 'tensor_paralel'"),
        (["--set", "block_size"], "--set takes NAME=VALUE, not 'block_size'"),
        (["--set", "=16"], "--set takes NAME=VALUE, not '=16'"),
        (["--set", "model=/mine"], "--set model: that has an option of its own"),
        (["--dtype", "float32", "--set", "dtype=float16"], "--set dtype: that has an option of its own"),
        (["--set", "tensor_parallel=2"], "--set tensor_parallel: that has an option of its own"),
        (["--set", "port=1"], "--set port: that has an option of its own"),
        (["--tensor-parallel", "0"], "tensor_parallel must be positive, not 0"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--model", "./nowhere"], "no such model folder: "),
        (["--model", "a/b/c"], "no such model folder: "),
        (["--drain-seconds", "-1"], "--drain-seconds must not be negative, not -1"),
        (["--repair-minutes", "nan"], "--repair-minutes must not be negative, not nan"),
        (["--log-mib", "-1"], "--log-mib must not be negative, not -1"),
        (["--log-files", "1"], "--log-files must be at least 2, not 1"),
        (["--name", "../x", "--model", "/"], "a model's name must be"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITONSPEED_RUN", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert server.main([*ANY_PORT, *arguments]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: ") and message in told
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """What a command line composes: task and parameters by name; samples and hubs stand in for themselves."""
    monkeypatch.setattr(server.samples, "fetch_all", lambda tasks: [Path("/samples", task) for task in tasks])
    monkeypatch.setattr(server.samples, "locate", lambda model, task: model or f"/samples/{task}")
    monkeypatch.setattr(server, "_on_gpu", lambda: False)

    def composed(*arguments):
        models = server.compose(options.parse(arguments), tmp_path / "models")
        found = {folder.name: repository.origin(models, folder.name) for folder in models.iterdir()}
        return {name: (made.task, made.parameters) for name, made in found.items()}

    return composed


def test_without_a_word_generate_and_embed_are_served(composed):
    assert composed("--dtype=float32", "--set=threads=1") == {
        task: (task, {"dtype": "float32", "threads": "1", "model": f"/samples/{task}"})
        for task in ("generate", "embed")
    }


def test_all_are_the_tasks_with_a_sample(composed):
    expected = ("generate", "embed", "classify", "qa", "text_to_image")
    assert composed("--all") == {task: (task, {"model": f"/samples/{task}"}) for task in expected}


@pytest.mark.parametrize(
    ("arguments", "name", "task", "model"),
    [
        (["--task=qa"], "qa", "qa", "/samples/qa"),
        (["--task=rerank", "--model=a/b"], "rerank", "rerank", "a/b"),
        (["--model=a/b"], "generate", "generate", "a/b"),
        (["--name=mine"], "mine", "generate", "/samples/generate"),
        (["--name=mine", "--task=embed", "--model=a/b"], "mine", "embed", "a/b"),
    ],
)
def test_what_is_named_is_served_alone(composed, arguments, name, task, model):
    assert composed(*arguments) == {name: (task, {"model": model})}


def test_beside_others_generate_leaves_them_room_on_a_gpu(composed, monkeypatch):
    monkeypatch.setattr(server, "_on_gpu", lambda: True)
    found = composed()
    assert found["generate"][1]["kv_cache_fraction"] == "0.6" and "kv_cache_fraction" not in found["embed"][1]


@pytest.mark.parametrize(("given", "fraction"), [(["--set=kv_cache_fraction=0.3"], "0.3"), (["--model=a/b"], None)])
def test_generate_alone_or_as_told_on_a_gpu(composed, monkeypatch, given, fraction):
    monkeypatch.setattr(server, "_on_gpu", lambda: True)
    assert composed(*given)["generate"][1].get("kv_cache_fraction") == fraction


@pytest.mark.parametrize("other", ["--model=a", "--name=a", "--task=qa", "--repository=a"])
def test_all_goes_with_no_other_choice(other, capsys):
    with pytest.raises(SystemExit):
        options.parse(["--all", other])
    assert "--all serves the samples" in capsys.readouterr().err


def test_the_health_port_goes_with_the_others():
    assert options.parse([]).health_port == 8003
    assert options.parse(["--port=9001"]).health_port == 0
    assert options.parse(["--port=9001", "--health-port=9003"]).health_port == 9003


def test_repository_and_model_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        options.parse(["--repository=x", "--set", "a=b"])
    assert "served as it is" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.task)
def test_each_task_is_greeted_with_its_example(command):
    (line,) = local_commands("mine", Ports("127.0.0.1", 9001, 2, 3), command.task)
    assert line.endswith(f" --name mine --port 9001 {command.example}")
    found = cli.parser().parse_args(shlex.split(line)[1:])
    assert (found.name, found.port) == ("mine", 9001)


# --- lines


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("tritonspeed | generate | rank 0 | loaded 40 %", "generate | rank 0 | loaded 40 %"),
        ('I1123 07:00:08.464342 9802 model_lifecycle.cc:472] "loading: ok:1"', None),
        ('W1123 07:00:08.847199 9802 metrics.cc:798] "DCGM unable to start"', None),
        ('E1123 07:00:08.462847 9802 server.cc:241] "CudaDriverHelper has not been initialized."', None),
        ('E1123 07:00:08.1 9802 backend_model.cc:692] "ERROR: Failed to create instance: x"', None),
        (r'E1123 07:00:08.1 98 model.py:8] "oh \"dear\"\nsecond"', 'tritonserver | oh "dear"'),
        (
            "E1123 07:08.8 9 model_lifecycle.c:6] \"failed to load 'bad' version 1: Internal: ValueError: no\\n\\nAt\"",
            "bad | failed: ValueError: no",
        ),
        ("error: creating server: Internal - failed to load all models", None),
        ("error: unknown option --x", "tritonserver | unknown option --x"),
        ("[INFO] noise of a library", None),
    ],
)
def test_only_telling_lines_are_shown(line, shown):
    assert telling(line) == shown


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    shown = []
    Output(Log(tmp_path / "log"), verbose=True, show=shown.append).read(["a\x1b[2Jb\n"])
    assert shown == ["a?[2Jb"]
    assert (tmp_path / "log").read_text() == "a\x1b[2Jb\n"


# --- leftovers


def dead_pid():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def aged(path):
    path.write_bytes(b"x" * 4096)
    os.utime(path, (time.time() - 60, time.time() - 60))
    return path


def test_sweep_takes_what_nobody_uses(tmp_path):
    aged(tmp_path / "deepspeed_allreduce_buffer_0_x")
    aged(tmp_path / f"tritonspeed_{dead_pid()}_x")
    stay = [aged(tmp_path / "somebody_elses"), aged(tmp_path / f"tritonspeed_{os.getpid()}_x")]
    fresh = tmp_path / "triton_python_backend_shm_region_new"
    fresh.write_bytes(b"x")
    assert len(leftovers.sweep(tmp_path)) == 2
    assert sorted(tmp_path.iterdir()) == sorted([*stay, fresh])


def test_sweep_leaves_what_a_process_has_mapped(tmp_path):
    used = aged(tmp_path / "triton_python_backend_shm_region_used")
    mapped = np.memmap(used, mode="r")  # numpy closes the file: the mapping alone is left
    assert leftovers.sweep(tmp_path) == []
    del mapped
    assert leftovers.sweep(tmp_path) == [used.name]


def test_sweep_in_a_user_namespace_takes_nothing_that_others_may_have_mapped(tmp_path):
    """There /proc does not tell what processes outside it have mapped."""
    used, dead = aged(tmp_path / "deepspeed_allreduce_buffer_0_used"), aged(tmp_path / f"tritonspeed_{dead_pid()}_x")
    apart = ["unshare", "-r"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces are not permitted here")
    holds = f"import numpy, time; kept = numpy.memmap({str(used)!r}, mode='r'); print(flush=True); time.sleep(60)"
    sweeps = (
        "import pathlib, sys; from backend.launcher.leftovers import sweep; print(sweep(pathlib.Path(sys.argv[1])))"
    )
    with subprocess.Popen([sys.executable, "-c", holds, "backend.ranks.rank"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        said = subprocess.run(
            [*apart, sys.executable, "-c", sweeps, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout
        holder.kill()
    assert said == f"['{dead.name}']\n" and used.exists()


# --- the real server


def infer(ready, model, values, timeout=30):
    port = re.search(r"(\d+) \(HTTP\)", ready)[1]
    tensor = {"name": "x", "datatype": "FP32", "shape": [len(values)], "data": values}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode()
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)["outputs"][0]["data"]


@pytest.mark.server
def test_real_server_serves_drains_and_leaves_nothing(launch, tmp_path):
    launcher = launch(f"--repository={REPOSITORY}")
    ready = launcher.until("ready after")
    assert f"echo | python {sys.executable}" in launcher.said
    descendants = [process.pid for process in psutil.Process(launcher.process.pid).children(recursive=True)]
    assert len(descendants) >= 3  # tritonserver, the stub, the stub's child
    assert infer(ready, "echo", [0.0, 2.0]) == [0.0, 2.0]
    answers = []
    slow = threading.Thread(target=lambda: answers.append(infer(ready, "echo", [2.0])))
    slow.start()
    time.sleep(0.5)  # the request is in the model
    launcher.process.send_signal(signal.SIGINT)
    slow.join()
    assert answers == [[2.0]]
    assert launcher.end() == 0
    assert_nothing_left(launcher, descendants, tmp_path / "run")


@pytest.mark.server
def test_real_server_one_broken_model(launch, tmp_path):
    models = tmp_path / "models"
    for name in ("echo", "broken"):
        (models / name / "1").mkdir(parents=True)
        for file in ("config.pbtxt", "1/model.py"):
            (models / name / file).write_text((REPOSITORY / "echo" / file).read_text())
    launcher = launch(f"--repository={models}")
    assert launcher.end() == 1
    assert "error: broken failed to load: LoadError: no such model: /nowhere" in launcher.said
    launcher = launch(f"--repository={models}", "--keep-going", "--explicit")
    assert infer(launcher.until("ready after"), "echo", [0.0]) == [0.0]
    assert "broken | failed: LoadError: no such model: /nowhere" in launcher.said
    launcher.process.terminate()
    assert launcher.end() == 0


@pytest.mark.server
def test_the_probe_sees_a_killed_stub(launch):
    launcher = launch(f"--repository={REPOSITORY}")
    port = int(re.search(r":(\d+) \(gRPC\)", launcher.until("ready after"))[1])
    assert probe.trouble(port) is None
    (stub,) = filter(health.is_stub, psutil.Process(launcher.process.pid).children(recursive=True))
    stub.suspend()
    eventually(lambda: probe.trouble(port) == "model echo: its process is gone or stopped")
    stub.resume()
    eventually(lambda: probe.trouble(port) is None)
    stub.kill()
    assert gone([stub.pid])
    eventually(lambda: probe.trouble(port) == "model echo: its process is gone or stopped")
    launcher.process.terminate()
    launcher.end()
    assert probe.trouble(port) == f"no server on port {port}"


@pytest.mark.server
def test_real_server_dies_with_a_killed_launcher(launch):
    launcher = launch(f"--repository={REPOSITORY}")
    launcher.until("ready after")
    server_process, *others = psutil.Process(launcher.process.pid).children(recursive=True)
    rank = others[-1]
    launcher.process.kill()
    try:
        assert gone([server_process.pid, *(process.pid for process in others[:-1])])  # tritonserver and the stub
    finally:
        rank.kill()
