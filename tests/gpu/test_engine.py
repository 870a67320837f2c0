"""The engine on CUDA against plain transformers on the same GPU: graphs, run-ahead, preemption, one rank and two."""

import random
import sys
from array import array
from pathlib import Path

import pytest

from backend.config import EngineConfig
from backend.generation.engine import Engine
from backend.generation.prompt import Prompt
from backend.generation.sequence import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))
from tiny import save_llama

pytestmark = pytest.mark.gpu
NEW = 40
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0)
DRAWN = SamplingParams(max_tokens=NEW, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=7, logprobs=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = dict(hidden_size=384, num_attention_heads=6, num_key_value_heads=3)
    return save_llama(tmp_path_factory.mktemp("tiny"), **shape)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    lengths = (1, 2, 7, 15, 16, 17, 33, 64, 100, 200, 300, 400)
    return [[rng.randrange(3, 300) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def wanted(folder, prompts):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
    greedy = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
    rows = [model.generate(torch.tensor([ids], device="cuda"), **greedy)[0] for ids in prompts]
    return [row[len(ids) :].tolist() for row, ids in zip(rows, prompts, strict=True)]


def generate(engine, prompts):
    tokens = {}
    for deltas in engine.run(prompts, timeout=60):
        for delta in deltas:
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
    return [tokens[index] for index in sorted(tokens)]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"cuda_graphs": "false"},
        {"run_ahead": "0"},
        {"run_ahead": "2"},
        {"num_blocks": "33", "max_model_len": "500"},
    ],
    ids=lambda parameters: "-".join(parameters) or "default",
)
def test_tokens_equal_transformers(folder, prompts, wanted, world, parameters):
    import torch

    if torch.cuda.device_count() < world:
        pytest.skip(f"{world} GPUs needed")
    given = {"model": str(folder), "dtype": "float32", "max_sequences": "16", "num_blocks": "2048"}
    given["tensor_parallel"] = str(world)
    engine = Engine(EngineConfig.from_parameters({**given, **parameters}), report=print)
    engine.start()
    try:
        assert generate(engine, [Prompt(array("i", ids), GREEDY) for ids in prompts]) == wanted
        assert (engine.tally.preemptions > 0) == ("num_blocks" in parameters)
        alone = generate(engine, [Prompt(array("i", prompts[5]), DRAWN)])
        crowd = generate(engine, [Prompt(array("i", ids), DRAWN) for ids in prompts])
        assert crowd[5] == alone[0]
        assert engine.check() == 0
    finally:
        engine.close()
