"""The tasks of one answer a request on the command line, against a fake server."""

import io
import json
import sys
from base64 import b64decode
from io import BytesIO

import fake_tasks
import numpy as np
import pytest
from PIL import Image

from client.cli import main, parser
from client.commands import COMMANDS, example
from client.tasks import TASKS
from client.terminal import iterm, kitty, painter

IMAGE = "\033_Ga=T,f=100,m=0;"


@pytest.fixture
def run(server, capsys):
    def run(command, *arguments):
        server.script = getattr(fake_tasks, command.replace("-", "_"))
        status = main([command, "--host", "127.0.0.1", "--port", str(server.port), *arguments])
        return status, *capsys.readouterr()

    return run


def give(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def kitty_terminal(monkeypatch):
    monkeypatch.setattr("client.drawing.painter", lambda stream: kitty)


def test_embed_prints_vectors(server, run):
    status, out, err = run("embed", "abc", "a")
    assert (status, err) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [[3, ord("a"), 0.5], [1, ord("a"), 0.5]]
    assert len(server.requests) == 1
    assert run("embed", "--json", "--name", "m", "abc")[1] == out.splitlines()[0] + "\n"
    assert server.requests[1].model == "m"


def test_embed_into_a_file(run, tmp_path):
    assert run("embed", "abc", "a", "--npy", str(tmp_path / "x.npy")) == (0, "", "")
    found = np.load(tmp_path / "x.npy")
    assert found.dtype == np.float32 and found.shape == (2, 3)
    status, _, err = run("embed", "abc", "--npy", str(tmp_path / "no" / "x.npy"))
    assert (status, err.count("\n")) == (1, 1)
    assert "cannot write" in err


def test_flags_of_a_task(server, run):
    assert run("embed", "a", "--dimensions", "2", "--no-normalize", "--prompt", "q: ")[0] == 0
    inputs = server.requests[0].inputs
    assert (inputs["dimensions"].item(), inputs["normalize"].item(), inputs["prompt"].item()) == (2, False, b"q: ")
    assert "truncate" not in inputs


def test_classify(run):
    assert run("classify", "good", "bad") == (0, "good\t0.7500\nother\t0.2500\n\nbad\t0.7500\n", "")
    assert json.loads(run("classify", "--json", "é")[1]) == [
        {"label": "é", "score": 0.75}, {"label": "other", "score": 0.25},
    ]  # fmt: skip


def test_classify_pairs_and_standard_input(server, run, monkeypatch):
    give(monkeypatch, b"from outside\n")
    assert run("classify", "--pair", "second")[1] == "from outside\t0.7500\nsecond\t0.2500\n"
    assert server.requests[0].inputs["text_pair"].item() == b"second"


@pytest.mark.parametrize("context", [["--context", "Ada wrote"], [], ["--context", "-"]])
def test_qa(run, monkeypatch, context):
    give(monkeypatch, b"Ada wrote")
    assert run("qa", "--question", "who?", *context)[1] == "Ada\t0.5000\t0\t3\n"


def test_qa_with_several_answers(run):
    given = ("qa", "--question", "who?", "--context", "Ada wrote", "--top-k", "2")
    assert run(*given)[1] == "Ada\t0.5000\t0\t3\nwrote\t0.5000\t1\t6\n"
    assert [found["answer"] for found in json.loads(run(*given, "--json")[1])] == ["Ada", "wrote"]


def test_rerank(run):
    assert run("rerank", "q", "bb", "a", "c c\nc")[1] == "2\t5.0000\tc c c\n0\t2.0000\tbb\n1\t1.0000\ta\n"


def test_token_classification(run):
    assert run("token-classification", "by Ada")[1] == "PER\t0.5000\tAda\t3\t6\n"
    assert run("token-classification", "--json", "nobody", "by Ada")[1].splitlines()[0] == "[]"


def test_fill_mask(server, run):
    assert run("fill-mask", "--top-k", "2", "a [MASK]")[1] == "\t0.5000\t0\ta [MASK]\n"
    assert server.requests[0].inputs["top_k"].item() == 2


def test_zero_shot_image(run, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    assert run("zero-shot-image", path, "--label", "cat", "--label", "dog")[1] == "dog\t0.5000\ncat\t0.5000\n"
    assert "cannot read" in run("zero-shot-image", "/nowhere.png", "--label", "cat")[2]


def test_text_to_image_into_files(server, run, tmp_path):
    output = str(tmp_path / "x.png")
    assert run("text-to-image", "red", "--output", output, "--steps", "3", "--seed", "7") == (0, f"{output}\n", "")
    assert Image.open(output).getpixel((0, 0)) == (255, 0, 0)
    inputs = server.requests[0].inputs
    assert (inputs["num_inference_steps"].item(), inputs["seed"].item()) == (3, 7)
    _, out, _ = run("text-to-image", "red", "--json", "--output", output, "--num-images-per-prompt", "2")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"file": str(tmp_path / f"x-{at}.png"), "seed": 7 + at} for at in (0, 1)
    ]
    assert (tmp_path / "x-1.png").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], "--output"), (["--output", "x.txt"], "must end in"), (["--output", "/nowhere/x.png"], "no folder")],
)
def test_nothing_is_drawn_without_a_place_for_it(server, run, arguments, named):
    status, out, err = run("text-to-image", "red", *arguments)
    assert (status, out) == (1, "")
    assert named in err
    assert not server.requests


def test_text_to_image_onto_the_terminal(run, kitty_terminal, tmp_path):
    status, out, _ = run("text-to-image", "red")
    assert status == 0 and out.startswith(IMAGE)
    assert out.count("\n") == 1
    _, out, _ = run("text-to-image", "red", "--output", str(tmp_path / "x.png"))
    assert out.startswith(IMAGE) and out.endswith(f"{tmp_path / 'x.png'}\n")
    assert "\033" not in run("text-to-image", "red", "--json", "--output", str(tmp_path / "x.png"))[1]


class Terminal:
    def __init__(self, is_one=True):
        self.isatty = lambda: is_one


@pytest.mark.parametrize(
    ("term", "program", "found"),
    [
        ("xterm-kitty", "", kitty), ("xterm-ghostty", "ghostty", kitty), ("xterm-256color", "iTerm.app", iterm),
        ("xterm-256color", "WezTerm", iterm), ("xterm-256color", "", None), ("tmux-256color", "iTerm.app", None),
        ("screen", "iTerm.app", None),
    ],
)  # fmt: skip
def test_which_terminals_show_images(monkeypatch, term, program, found):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("TERM_PROGRAM", program)
    assert painter(Terminal()) is found
    assert painter(Terminal(is_one=False)) is None


def test_kitty_gets_pieces():
    data = bytes(range(256)) * 40
    pieces = kitty(data).split("\033\\")[:-1]
    assert [piece.partition(";")[0] for piece in pieces] == ["\033_Ga=T,f=100,m=1", *["\033_Gm=1"] * 2, "\033_Gm=0"]
    assert all(len(piece.partition(";")[2]) <= 4096 for piece in pieces)
    assert b64decode("".join(piece.partition(";")[2] for piece in pieces)) == data


def test_iterm_gets_one_piece():
    file = BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    head, _, rest = iterm(file.getvalue()).partition(":")
    assert head == f"\033]1337;File=inline=1;size={len(file.getvalue())}"
    assert b64decode(rest.removesuffix("\a")) == file.getvalue()


def test_every_task_has_a_command_with_an_example():
    assert ["generate", *[each.task for each in COMMANDS]] == [*TASKS]
    for each in COMMANDS:
        assert example(each.task) == each.example
    choices = next(iter(parser()._subparsers._group_actions)).choices
    for each in COMMANDS:
        text = choices[each.task.replace("_", "-")].format_help()
        assert all(f"--{name.replace('_', '-')}" in text for name in each.keys), each.task
