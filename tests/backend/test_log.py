"""The launcher's log: bounded, whole in the order of its files, and no reason to stop reading."""

import pytest

from backend.launcher.log import Log
from backend.launcher.output import Output


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def lines(count):
    return [f"line {number:04}: ä %s %d\n" for number in range(count)]


def test_it_gets_no_longer_than_its_files_may(tmp_path):
    log = Log(tmp_path / "8001.log", size=1000, files=3)
    for line in lines(500):
        log.write(line)
    log.close()
    assert files(tmp_path) == ["8001.1.log", "8001.2.log", "8001.log"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    kept = "".join((tmp_path / f"8001{part}.log").read_text() for part in (".2", ".1", ""))
    assert len(kept) > 1500 and "".join(lines(500)).endswith(kept)


def test_without_a_bound_there_is_one_file(tmp_path):
    log = Log(tmp_path / "8001.log")
    for line in lines(500):
        log.write(line)
    log.close()
    assert (tmp_path / "8001.log").read_text() == "".join(lines(500))
    assert files(tmp_path) == ["8001.log"]


def test_a_new_one_begins_empty_and_takes_no_other_ports_files(tmp_path):
    for name in ("8001.log", "8001.1.log", "8001.12.log"):
        (tmp_path / name).write_text("old\n")
    for name in ("80011.log", "18001.1.log", "8001.json"):
        (tmp_path / name).write_text("another's\n")
    Log(tmp_path / "8001.log").close()
    assert files(tmp_path) == ["18001.1.log", "8001.json", "8001.log", "80011.log"]
    assert (tmp_path / "8001.log").read_text() == ""


def test_what_cannot_be_written_is_told_once_and_the_server_is_read_on(tmp_path, capsys, monkeypatch):
    shown = []
    output = Output(Log(tmp_path / "8001.log"), False, shown.append)

    def full(record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.log._file, "shouldRollover", full)
    output.read(["tritonspeed | a | ready in 1 s\n"] * 3)
    assert shown == ["a | ready in 1 s"] * 3
    told = capsys.readouterr().err
    assert told.count("cannot be written: [Errno 28] No space left") == 1


@pytest.mark.parametrize("line", ["no end", "an end\n"])
def test_each_line_ends(tmp_path, line):
    Output(Log(tmp_path / "8001.log"), False, print).read([line])
    assert (tmp_path / "8001.log").read_text() == f"{line.strip()}\n"
