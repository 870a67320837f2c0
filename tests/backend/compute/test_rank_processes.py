"""The ranks that other tests start: what comes back of them, and what is said when one fails."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import rank_processes
from rank_processes import Ranks


def gathered(rank, world, factor):
    from backend.compute.tensor_parallel import all_gather

    return all_gather(torch.tensor([rank * factor]), world)


def fails(rank, world, how, joined):
    if rank == 0:
        joined.touch()
        time.sleep(600)  # as in a collective that the other does not enter
    while not joined.exists():
        time.sleep(0.01)
    if how == "raise":
        raise ValueError("the second rank's own words")
    os.abort()


def test_answers_come_by_rank():
    assert [answer.tolist() for answer in Ranks(2, gathered, 3).results()] == [[[0], [3]]] * 2


@pytest.mark.parametrize(
    ("how", "end", "words"),
    [("raise", "exit code 1", "ValueError: the second rank's own words"), ("abort", "exit code -6 (SIGABRT)", "")],
)
def test_a_rank_that_fails_is_named_with_its_exit_code(how, end, words, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(rank_processes, "MOMENT", 0.1)
    ranks = Ranks(2, fails, how, tmp_path / "joined")
    with pytest.raises(AssertionError) as raised:
        ranks.results()
    first, *more = str(raised.value).splitlines()
    assert first == f"rank 0 was still running and has been killed; rank 1 ended with {end}"
    assert words in "\n".join(more) and words in capfd.readouterr().err
    assert not ranks._folder.exists()
