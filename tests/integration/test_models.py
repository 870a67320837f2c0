"""Models that come, change and go in a running server, and models that cannot load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving import eventually, gone

from backend import repository
from client import InvalidInput, ServerError, Unavailable, deploy, models, undeploy

pytestmark = pytest.mark.server

GREEDY = {"max_tokens": 20, "temperature": 0.0}
LONG = [5] * 40
"""A prompt as token ids."""

REASONS = {
    "misspelt": "unknown parameter 'max_sequencs' in config.pbtxt; known: max_sequences, ",
    "missing": "no such model folder: ",
    "pickled": "pickled weights only (pytorch_model.bin); pickle can run code and is refused",
    "phi3": "phi3 cannot be split over 2 ranks: ",
    "heads": "tensor_parallel 4 is more than the model's 3 key/value heads",
}


@pytest.fixture(autouse=True)
def announced(served, monkeypatch):
    """Where this server's launcher told of itself; where none answers, deploy would start another one."""
    assert served.process.poll() is None, served.said
    monkeypatch.setenv("TRITONSPEED_RUN", str(served.run))


@pytest.fixture(scope="module")
def expected(served):
    """What the tiny model writes after "the quick", on one rank."""
    with served.pipeline("tiny") as pipe:
        return pipe("the quick", **GREEDY).text


def state(served, name):
    """The model's state and reason in the repository index; None where it is not in it."""
    return next(((m.state, m.reason) for m in models(host="127.0.0.1", port=served.port) if m.name == name), None)


@pytest.mark.parametrize("name", REASONS)
def test_models_that_cannot_load(served, name):
    """Unavailable with a reason in one line, no process left, asked for at the start or later."""
    for again in (False, True):
        what, reason = state(served, name)
        assert what == "UNAVAILABLE" and REASONS[name] in reason and "\n" not in reason and len(reason) < 600
        with served.pipeline(name, retries=0) as pipe, pytest.raises(Unavailable):
            pipe("a")
        assert gone(served.processes(f"/{name}/")) == []
        if not again:
            with served.control() as control, pytest.raises(InvalidInput, match=r"could not be loaded: "):
                control.load(name, 60)
    with served.pipeline("tiny") as pipe:
        assert pipe("a", max_tokens=2, ignore_eos=True).num_output_tokens == 2


def test_models_beside_each_other(served, expected):
    """Each answers as itself while the others work."""
    with served.pipeline("tiny") as tiny, served.pipeline("single") as single, served.pipeline("smollm2") as smollm2:
        streams = [pipe.stream("the quick", **GREEDY) for pipe in (tiny, single, smollm2)]
        texts = ["".join([next(stream), *stream]) for stream in streams]
    assert texts[0] == texts[1] == expected != texts[2]


def test_deploy_reload_unload_undeploy(served, tiny, expected):
    """A model's whole life, through the client."""
    lines = []
    where = {"host": "127.0.0.1", "port": served.port}
    with deploy(tiny, name="guest", max_model_len=64, max_sequences=8, **where, tell=lines.append) as pipe:
        assert pipe("the quick", **GREEDY).text == expected
        assert pipe(LONG, max_tokens=30, ignore_eos=True).num_output_tokens == 24
        assert state(served, "guest") == ("READY", "") and any("64 tokens" in line for line in lines)
        _, before = served.family("guest")

        with pytest.raises(InvalidInput, match="key/value heads"):  # refused before anything is touched
            deploy(tiny, name="guest", tensor_parallel=7, **where)
        spoilt = served.repository / "guest" / "config.pbtxt"
        good = spoilt.read_text()
        spoilt.write_text(good + 'parameters { key: "wrong" value { string_value: "1" } }')
        with served.control() as control:
            with pytest.raises((InvalidInput, ServerError), match="unknown parameter 'wrong'"):
                control.load("guest", 60)
            assert pipe("the quick", **GREEDY).text == expected  # a failed reload leaves the old one
            spoilt.write_text(good)

            deploy(tiny, name="guest", max_model_len=32, max_sequences=8, **where).close()
            with pytest.raises(InvalidInput, match="40 tokens, the limit is 31"):
                pipe(LONG)
            assert pipe("the quick", **GREEDY).text == expected
            assert gone(before) == []

            stub, ranks = eventually(lambda: served.family("guest"))
            control.unload("guest", 60)
            control.wait_gone("guest", 60)
            assert gone([stub, *ranks]) == []
            with pytest.raises(Unavailable):
                pipe("the quick", timeout=60)
            control.load("guest", 120)
            assert pipe("the quick", **GREEDY).text == expected

        _, ranks = served.family("guest")
        undeploy("guest", **where)
        assert gone(ranks) == [] and not (served.repository / "guest").exists()
        assert state(served, "guest") is None or state(served, "guest")[0] != "READY"


def tritonspeed(served, command, *words):
    program = Path(sys.executable).parent / "tritonspeed"
    line = [program, command, "--host=127.0.0.1", f"--port={served.port}", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)


def test_two_ranks_through_the_command_line(served, tiny, expected):
    """The text of one rank."""
    more = ["--set", "max_sequences=8", "--max-model-len=128"]
    done = tritonspeed(served, "deploy", str(tiny), "--name=pair", "--tensor-parallel=2", *more)
    assert done.returncode == 0, done.stderr
    assert "pair: ready" in done.stderr
    _, ranks = served.family("pair")
    assert len(ranks) == 2
    done = tritonspeed(served, "list")
    assert any(line.split() == ["pair", "READY"] for line in done.stdout.splitlines())
    listed = [json.loads(line) for line in tritonspeed(served, "list", "--json").stdout.splitlines()]
    assert {one["name"] for one in listed} >= {"pair", "tiny", "smollm2", *REASONS}
    done = tritonspeed(served, "generate", "--name=pair", "--temperature=0", "--max-tokens=20", "the quick")
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    done = tritonspeed(served, "undeploy", "pair")
    assert done.returncode == 0, done.stderr
    assert gone(ranks) == []
    done = tritonspeed(served, "undeploy", "pair")
    assert done.returncode == 1 and done.stderr.startswith("error: there is no model 'pair'")


def test_what_deploy_has_not_written_stays(served, tiny):
    folder = served.repository / "foreign"
    repository.write(served.repository, "generate", "foreign", {"model": str(tiny)})
    (folder / repository.MARK).unlink()
    with pytest.raises(InvalidInput, match="was not written by tritonspeed"):
        deploy(tiny, name="foreign", host="127.0.0.1", port=served.port)
    assert eventually(folder.is_dir)
