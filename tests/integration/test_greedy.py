"""The engine on SmolLM2 against transformers' `generate`, token by token, however the work is cut up.

The reference runs once; each engine then answers the same 50 prompts one after the other or all at once. A greedy
step whose two best tokens are closer than TIE may fall either way in another order of additions: texts are
compared up to it, and few may have one.
"""

from __future__ import annotations

import codecs
import json
import sys
import this
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from processes import ranks

from backend.compute.sampler import Sampler
from backend.config import EngineConfig
from backend.generation.engine import Engine
from backend.generation.plan import History, Sampling
from backend.generation.request import Request

ROOT = Path(__file__).parents[2]
NEW, FEW, TIE, MOST_TIES = 16, 4, 1e-3, 2
"""New tokens of each prompt; of those asked one after the other; a near tie's logits; prompts that may have one."""
BATCH = 13
"""Short prompts that transformers answers at once."""
LENGTHS = (1500, 513, 340, 256, 200, 129, 128, 127, 96, 65, 64, 63, 50, 40, 34, 33, 32, 31, 24, 20, 18, 17, 16, 15)
"""Tokens of the prompts cut from a long text; many at the borders of blocks."""

ZEN = codecs.decode(this.s, "rot13").splitlines()
TEXTS = [
    "The capital of France is",
    "Hello",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "2 + 2 =",
    "Die Hauptstadt von Österreich ist",
    "La capitale de l'Italie est",
    "日本の首都は",
    "Столица России —",
    "Η πρωτεύουσα της Ελλάδας είναι",
    "I love 🍕 and 🎉 because",
    '{"name": "Alice", "age":',
    "\n\n",
]
CHATS = [
    ["What is the capital of France?"],
    ["Say hello in German.", "Hallo!", "And in French?"],
    ["Nenne drei Farben."],
    ["Write a haiku about the sea."],
]
FIELDS: dict[str, Any] = {"temperature": 0.0, "exclude_input_in_output": True, "return_finish_reason": True}
DRAWS: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "seed": 2},
    {"temperature": 1.3, "top_k": 20, "seed": 2**63 + 5},
    {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 4},
    {"temperature": 1.0, "frequency_penalty": 0.5, "presence_penalty": 0.5, "seed": 5},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "seed": 6},
]
"""How the sampled prompts are sampled, in turn."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Row = dict[str, Any]


@dataclass
class Answer:
    """What the engine made of one prompt."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    responses: int = 0


@dataclass
class Want:
    """What transformers makes of it."""

    ids: list[int]
    text: str
    length: int
    """Tokens before the first near tie."""


@cache
def rows() -> list[Row]:
    """Fifty prompts, as inputs of generate: text, ids and chats."""
    text = (ROOT / "LICENSE").read_text()
    ids = tokenizer()(text)["input_ids"]
    cut: list[Row] = [{"input_ids": ids[start * 7 : start * 7 + length]} for start, length in enumerate(LENGTHS)]
    texts: list[Row] = [{"text_input": line.encode()} for line in [*TEXTS, *(line for line in ZEN if line)]]
    roles = ("user", "assistant")
    chats = [[{"role": roles[i % 2], "content": said} for i, said in enumerate(chat)] for chat in CHATS]
    found = [*cut, *({"messages": json.dumps(chat).encode()} for chat in chats), *texts][:50]
    assert len(found) == 50
    return found


@cache
def folder() -> Path:
    from backend import samples

    return samples.fetch("generate")


@cache
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder())


def prompt_ids(row: Row) -> list[int]:
    """By transformers' own tokenizer and template."""
    if "input_ids" in row:
        return list(row["input_ids"])
    if "text_input" in row:
        return list(tokenizer()(row["text_input"].decode())["input_ids"])
    chat = json.loads(row["messages"])
    return list(tokenizer().apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


class Draw(transformers.LogitsProcessor):
    """Leaves one token possible: that which the sampler draws from these logits."""

    def __init__(self, how: Row, prompt: list[int], length: int, vocabulary: int) -> None:
        """The prompt, and how long it is once filled up."""
        self.how, self.length = how, length
        self.sampler = Sampler(vocabulary, 1, "cpu")
        self.histories = [History(0, np.array(prompt, np.int32), np.zeros(0, np.int32))]
        self.slot = np.zeros(1, np.int32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sampling = self.sampling(input_ids.shape[1] - self.length)
        histories = self.histories if sampling.penalised else []
        chosen, _ = self.sampler.sample(scores, sampling, self.slot, histories)
        self.histories = []
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def sampling(self, counter: int) -> Sampling:
        def one(name: str, default: float, kind: Any = np.float32) -> Any:
            return np.array([self.how.get(name, default)]).astype(kind)

        return Sampling(
            one("temperature", 1), one("top_p", 1), one("top_k", 0, np.int32), one("min_p", 0),
            one("repetition_penalty", 1), one("frequency_penalty", 0), one("presence_penalty", 0),
            np.array([self.how["seed"]], np.uint64).view(np.int64), np.array([counter]),
            np.zeros((0, 2), np.int64), False,
        )  # fmt: skip


class Draws(transformers.LogitsProcessor):
    """A Draw for each row."""

    def __init__(self, draws: list[Draw]) -> None:
        self.draws = draws

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([draw(input_ids, row[None]) for draw, row in zip(self.draws, scores, strict=True)])


@pytest.fixture(scope="session")
def model(smollm2: Path) -> Any:
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


Generated = tuple[list[int], list[float]]
"""New tokens, and by how much each logit was ahead of the next."""


def generate(model: Any, prompts: list[list[int]], how: list[Row] | None = None) -> list[Generated]:
    """By transformers, greedily or sampled; short prompts are filled up from the left and share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, Generated] = {}
    while order:
        size = 1 if len(prompts[order[0]]) > 150 else BATCH
        batch, order = order[:size], order[size:]
        made = _batch(model, [prompts[i] for i in batch], [how[i] for i in batch] if how else None)
        found |= zip(batch, made, strict=True)
    return [found[i] for i in range(len(prompts))]


def _batch(model: Any, prompts: list[list[int]], how: list[Row] | None) -> list[Generated]:
    length, eos = max(map(len, prompts)), tokenizer().eos_token_id
    fill = [length - len(prompt) for prompt in prompts]
    ids = torch.tensor([[eos] * n + prompt for n, prompt in zip(fill, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (length - n) for n in fill])
    vocabulary = model.config.vocab_size
    draws = [Draw(row, prompt, length, vocabulary) for row, prompt in zip(how or [], prompts, strict=bool(how))]
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=eos,
            output_logits=True, return_dict_in_generate=True, logits_processor=[Draws(draws)] if draws else [],
        )  # fmt: skip
    best = torch.stack(out.logits, 1).topk(2).values  # [rows, new tokens, 2]
    leads = (best[..., 0] - best[..., 1]).tolist()
    ends = [_until(tokens, eos) for tokens in out.sequences[:, length:].tolist()]
    return [(tokens, lead[: len(tokens)]) for tokens, lead in zip(ends, leads, strict=True)]


def _until(tokens: list[int], last: int) -> list[int]:
    return tokens[: tokens.index(last) + 1] if last in tokens else tokens


@pytest.fixture(scope="session")
def greedy(model: Any) -> list[Want]:
    """The reference for every prompt."""
    found = []
    for ids, leads in generate(model, [prompt_ids(row) for row in rows()]):
        length = next((place for place, lead in enumerate(leads) if lead < TIE), len(ids))
        found.append(Want(ids, tokenizer().decode(ids, skip_special_tokens=True), length))
    return found


def first(want: Want, count: int) -> Want:
    """The reference, had fewer tokens been asked for."""
    return Want(ids := want.ids[:count], tokenizer().decode(ids, skip_special_tokens=True), min(want.length, len(ids)))


def sampled_rows() -> list[Row]:
    return [{**row, **DRAWS[i % len(DRAWS)]} for i, row in enumerate(rows()[9:45:3])]


@pytest.fixture(scope="session")
def drawn(model: Any) -> list[str]:
    """What the sampler makes of transformers' logits."""
    made = generate(model, [prompt_ids(row) for row in sampled_rows()], sampled_rows())
    return [tokenizer().decode(ids, skip_special_tokens=True) for ids, _ in made]


# --- engines


@contextmanager
def running(folder: Path, **parameters: Any) -> Iterator[Engine]:
    """An engine with ranks of its own, gone afterwards."""
    others = set(ranks())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITONSPEED_PYTHON", sys.executable)
        config = EngineConfig(model=str(folder), device="cpu", dtype="float32", max_model_len=1536, **parameters)
        engine = Engine(config, lambda line: None)
        engine.start()
    pids = set(ranks()) - others
    try:
        yield engine
        assert engine.check() == 0
    finally:
        engine.close()
    assert pids and not any(map(psutil.pid_exists, pids))


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Iterator[Engine]:
    with running(smollm2) as engine:
        yield engine


@pytest.fixture(scope="module")
def split(smollm2: Path) -> Iterator[Engine]:
    with running(smollm2, tensor_parallel=2) as engine:
        yield engine


def answer(engine: Engine, row: Row, stream: bool) -> Answer:
    """One request as generate's model.py serves it, with the token ids that the engine gave."""
    fields = {**FIELDS, "max_tokens": NEW, **row, "stream": stream}
    request = Request.parse([fields], {}, engine)
    found = Answer()
    for deltas in engine.run(request.prompts, timeout=600):
        found.ids += array("i", deltas[0].token_ids)
        if (outputs := request.answer(deltas)) is not None:
            found.text += outputs["text_output"][0, 0].decode()
            found.reason = outputs["finish_reason"][0, 0].decode()
            found.responses += 1
    return found


def alone(engine: Engine, rows: list[Row], odd: bool = True) -> list[Answer]:
    """One after the other; every other one streamed: those of odd or of even number."""

    return [answer(engine, row, bool(i % 2) == odd) for i, row in enumerate(rows)]


def together(engine: Engine, rows: list[Row], odd: bool = False) -> list[Answer]:
    """All at once; streamed are those of even or of odd number."""

    with ThreadPoolExecutor(len(rows)) as threads:
        return list(threads.map(lambda i: answer(engine, rows[i], bool(i % 2) == odd), range(len(rows))))


def assert_equal(found: list[Answer], wanted: list[Want]) -> None:
    wrong = [i for i, (got, want) in enumerate(zip(found, wanted, strict=True)) if not equal(got, want)]
    assert [(i, found[i], wanted[i]) for i in wrong] == []


def equal(got: Answer, want: Want) -> bool:
    if want.length < len(want.ids):
        return got.ids[: want.length] == want.ids[: want.length]
    reason = "stop" if want.ids[-1] == tokenizer().eos_token_id else "length"
    return (got.ids, got.text, got.reason) == (want.ids, want.text, reason)


# --- tests


def test_the_reference_has_few_near_ties_and_prompts_of_every_length(greedy: list[Want]) -> None:
    assert sum(want.length < len(want.ids) for want in greedy) <= MOST_TIES
    lengths = [len(prompt_ids(row)) for row in rows()]
    assert (len(lengths), min(lengths), max(lengths)) == (50, 1, 1500)
    assert any(want.ids[-1] == tokenizer().eos_token_id for want in greedy)


def test_one_after_the_other(plain: Engine, greedy: list[Want]) -> None:
    found = alone(plain, [{**row, "max_tokens": FEW} for row in rows()])
    assert_equal(found, [first(want, FEW) for want in greedy])
    assert all(got.responses == 1 for got in found[::2])
    assert sum(got.responses for got in found[1::2]) > FEW // 2 * len(found[1::2])


def test_all_at_once_with_the_prefixes_of_the_pass_before(plain: Engine, greedy: list[Want]) -> None:
    assert_equal(together(plain, rows()), greedy)
    before = plain.tally.prefix_hits
    assert_equal(together(plain, rows(), odd=True), greedy)
    assert plain.tally.prefix_hits - before >= sum(LENGTHS) // 16 * 16 - 16 * len(LENGTHS)


def test_all_at_once_on_two_ranks(split: Engine, greedy: list[Want]) -> None:
    assert_equal(together(split, rows()), greedy)


def test_one_after_the_other_on_two_ranks(split: Engine, greedy: list[Want]) -> None:
    assert_equal(alone(split, [{**row, "max_tokens": FEW} for row in rows()]), [first(want, FEW) for want in greedy])


def test_with_preemption(smollm2: Path, greedy: list[Want], drawn: list[str]) -> None:
    with running(smollm2, block_size=4, num_blocks=385, step_tokens=256) as engine:
        assert_equal(together(engine, rows()), greedy)
        first = engine.tally.preemptions
        assert first > 0
        crowd = [*rows()[2:7], *sampled_rows()]  # the youngest are preempted
        assert [got.text for got in together(engine, crowd)[5:]] == drawn
        assert engine.tally.preemptions > first


def test_without_prefix_cache_and_run_ahead(smollm2: Path, greedy: list[Want]) -> None:
    with running(smollm2, prefix_cache=False, run_ahead=0) as engine:
        assert_equal(together(engine, rows()), greedy)
        assert_equal(together(engine, rows()[3:], odd=True), greedy[3:])
        assert engine.tally.prefix_hits == 0


def test_sampled_text_is_that_of_its_seed_whatever_shares_the_batch(plain: Engine, drawn: list[str]) -> None:
    assert len(set(drawn)) == len(drawn)
    assert [got.text for got in alone(plain, sampled_rows()[::2])] == drawn[::2]
    crowd = together(plain, [*sampled_rows(), *rows()[8:]])
    assert [got.text for got in crowd[: len(drawn)]] == drawn


def test_sampled_text_is_that_of_its_seed_on_two_ranks(split: Engine, drawn: list[str]) -> None:
    assert [got.text for got in together(split, sampled_rows())] == drawn


def test_the_prompt_opens_the_text_unless_left_out(plain: Engine, greedy: list[Want]) -> None:
    number = next(i for i, row in enumerate(rows()) if "text_input" in row)
    row = {**rows()[number], "exclude_input_in_output": False}
    (got,) = alone(plain, [row])
    assert got.text == row["text_input"].decode() + greedy[number].text
