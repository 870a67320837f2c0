"""No device memory for a step, on one rank: what cannot be computed fails alone. docs/faults.md, 7."""

import sys
import threading
from array import array
from pathlib import Path

import pytest

from backend.config import EngineConfig
from backend.errors import ServingError
from backend.generation.engine import Engine
from backend.generation.prompt import Prompt
from backend.generation.sequence import SamplingParams

FAKES = Path(__file__).parents[2] / "fakes"
sys.path.insert(0, str(FAKES))
from tiny import save_llama  # noqa: E402

STARVES, FULL, FEW = 292, 293, 10  # of failing_decoder, which imports torch
GREEDY = SamplingParams(max_tokens=30, temperature=0.0)
PENALISED = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, presence_penalty=0.5, seed=3, logprobs=True)
STEP_TOKENS = 64


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def engine(request, tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(FAKES))
        environment.setenv("TRITONSPEED_PYTHON", sys.executable)
        config = EngineConfig(
            model=str(folder), device="cpu", threads=1, tensor_parallel=request.param, max_sequences=6, block_size=4,
            step_tokens=STEP_TOKENS, step_timeout=120.0,
        )  # fmt: skip
        lines = []
        engine = Engine(config, lines.append, "failing_decoder:FailingDecoder")
        engine.lines = lines
        engine.start()
        yield engine
        engine.close()


def prompt(ids, params=GREEDY, **more):
    return Prompt(array("i", ids), params, **more)


def tokens(engine, *prompts):
    found = {}
    for deltas in engine.run(list(prompts), timeout=120):
        for delta in deltas:
            found.setdefault(delta.index, []).extend(delta.token_ids)
    return [found[index] for index in sorted(found)]


def starving(length, at, first=100):
    ids = [first + place % 100 for place in range(length)]
    ids[at] = STARVES
    return ids


NEIGHBOURS = [prompt([5, 6, 7]), prompt([8, 9], PENALISED), prompt([*range(10, 22)], n=2)]


@pytest.mark.parametrize(("length", "at"), [(30, 29), (150, 10), (150, 70), (150, 149)])
def test_what_finds_no_memory_fails_alone(engine, length, at):
    """In its only chunk, the first, one in the middle (its next one is on its way already) and the last."""
    alone = [tokens(engine, each) for each in NEIGHBOURS]
    found = [None] * len(NEIGHBOURS)

    def ask(index):
        found[index] = tokens(engine, NEIGHBOURS[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(NEIGHBOURS))]
    for thread in threads:
        thread.start()
    for _ in range(2):
        with pytest.raises(ServingError, match=r"no memory left.*\(n\).*max_tokens.*step_tokens") as raised:
            tokens(engine, prompt(starving(length, at)))
        assert raised.type is ServingError
    for thread in threads:
        thread.join()
    assert found == alone
    assert engine.tally.restarts == 0 and engine.check() == 0
    assert "rank 0 | no device memory for 1 of" in "".join(engine.lines)


def test_a_whole_request_fails_once_and_its_place_is_free(engine):
    for _ in range(3):  # more sequences than max_sequences
        with pytest.raises(ServingError, match="no memory left"):
            tokens(engine, prompt([5, 6, 7], n=2), prompt(starving(40, 20), n=2))
    assert engine.check() == 0
    assert len(tokens(engine, prompt([5, 6, 7], n=6))) == 6


def test_what_was_not_computed_is_no_known_prefix(engine):
    ids = [30 + place for place in range(24)]
    fresh = tokens(engine, prompt([*ids, 7], salt=b"unshared"))
    with pytest.raises(ServingError, match="no memory left"):
        tokens(engine, prompt([*ids, STARVES]))
    before = engine.tally.prefix_hits
    assert tokens(engine, prompt([*ids, 7])) == fresh
    assert engine.tally.prefix_hits == before
    assert tokens(engine, prompt([*ids, 7])) == fresh
    assert engine.tally.prefix_hits == before + 24


def test_a_chunk_before_the_lost_one_is_still_known(engine):
    with pytest.raises(ServingError, match="no memory left"):
        tokens(engine, prompt(starving(100, 70, first=60)))
    before, whole = engine.tally.prefix_hits, [60 + place % 100 for place in range(100)]
    assert tokens(engine, prompt(whole)) == tokens(engine, prompt(whole, salt=b"unshared"))
    assert engine.tally.prefix_hits == before + STEP_TOKENS


def test_the_longest_goes_first_and_only_until_the_rest_fits(engine):
    """A step of more than FEW tokens is refused once FULL is in it: the long prompt goes, the short ones stay."""
    short = [prompt([FULL, 5]), prompt([FULL, 6, 7])]
    alone = [tokens(engine, each) for each in short]
    held = engine._inbox  # both kinds in one step
    wait = threading.Event()
    held.put(wait.wait)
    found = [None] * 3

    def ask(index, each):
        try:
            found[index] = tokens(engine, each)
        except ServingError as error:
            found[index] = str(error)

    asked = [*short, prompt([FULL, *range(5, 5 + FEW)])]
    threads = [threading.Thread(target=ask, args=each) for each in enumerate(asked)]
    for thread in threads:
        thread.start()
    while held.qsize() < 3:
        wait.wait(0.01)
    wait.set()
    for thread in threads:
        thread.join()
    assert found[:2] == alone and "no memory left" in found[2]
