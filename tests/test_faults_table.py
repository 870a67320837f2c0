"""docs/faults.md: all 28 lines are there, and every test that it names."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "faults.md").read_text()


def named():
    """File and test of every mention; `::test` alone belongs to the file before it in the same cell."""
    for cell in TABLE.replace("\n", "|").split("|"):
        file = ""
        for found, test in re.findall(r"([\w/]*)::(test_\w+)", cell):
            file = found or file
            yield file, test


def path(file):
    return next(at for at in (TESTS / f"{file}.py", TESTS.parent / f"{file}.py") if at.is_file())


def test_every_line_is_there():
    assert [int(number) for number in re.findall(r"^\| (\d+) \|", TABLE, re.M)] == list(range(1, 29))


def test_every_test_is_there():
    pairs = list(named())
    assert len(pairs) > 50
    for file, test in pairs:
        assert f"def {test}(" in path(file).read_text(), (file, test)
