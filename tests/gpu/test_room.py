"""Device memory that runs out while the engine serves, and whether what is asked for before a step is enough for it."""

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

FAKES = Path(__file__).parents[1] / "fakes"
sys.path.insert(0, str(FAKES))
from tiny import save_llama  # noqa: E402

pytestmark = pytest.mark.gpu
FILLS, FREES = 292, 293  # of crowded_decoder
LONG = SamplingParams(max_tokens=400, temperature=0.0)
SHORT = SamplingParams(max_tokens=5, temperature=0.0)


def prompt(params, *ids):
    return Prompt(array("i", ids), params)


def tokens(engine, asked, begun=lambda: None):
    found = []
    for deltas in engine.run([asked], timeout=60):
        found += [token for delta in deltas for token in delta.token_ids]
        begun()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_device_fails_new_prompts_and_no_decode(tmp_path, monkeypatch, world):
    import torch

    if torch.cuda.device_count() < world:
        pytest.skip(f"{world} GPUs needed")
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)
    folder = save_llama(tmp_path, hidden_size=384, num_attention_heads=6, num_key_value_heads=6)
    config = EngineConfig(
        model=str(folder), device="cuda", dtype="float32", tensor_parallel=world, max_sequences=8, num_blocks=200
    )
    engine = Engine(config, print, "crowded_decoder:CrowdedDecoder")
    engine.start()
    try:
        alone = tokens(engine, prompt(LONG, 5, 6, 7))
        begun, found = threading.Event(), []
        neighbour = threading.Thread(target=lambda: found.extend(tokens(engine, prompt(LONG, 5, 6, 7), begun.set)))
        neighbour.start()
        assert begun.wait(60)
        for first in (FILLS, 9):
            with pytest.raises(ServingError, match="no memory left") as raised:
                tokens(engine, prompt(SHORT, first, 10, 11))
            assert raised.type is ServingError
        neighbour.join()
        assert found == alone
        assert len(tokens(engine, prompt(SHORT, FREES, 10, 11))) == 5
        assert tokens(engine, prompt(LONG, 5, 6, 7)) == alone
        assert engine.tally.restarts == 0 and engine.check() == 0
    finally:
        engine.close()


def test_what_is_asked_for_is_enough(tmp_path):
    import torch

    from backend.compute.decoder import Decoder, decode, prefill
    from backend.compute.room import SPARE
    from backend.ranks.rank import Birth

    shape = dict(hidden_size=1024, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=8)
    folder = save_llama(tmp_path, vocab_size=64000, max_position_embeddings=4096, **shape)
    config = EngineConfig(
        model=str(folder), device="cuda", dtype="bfloat16", step_tokens=4096, max_sequences=128, kv_cache_fraction=0.1,
    )  # fmt: skip
    decoder = Decoder(Birth("", config, 0, 1, "", 0), print)
    decoder.capacity()
    decoder.allocate(600, 4096)
    room = decoder._room
    assert room.per_token * 4096 > SPARE / 4 and room.per_row * 128 > SPARE / 4  # the model is not too small to tell
    plans = [prefill(count, 4096, config.block_size, 128) for count in (1, 17, 300, 1025, 4096)]
    plans += [prefill(4096, longest, config.block_size, 128) for longest in (32, 500)]
    plans += [decode(count, costly) for count in (1, 7, 128) for costly in (False, True)]
    for plan in plans:
        wanted = room.bytes(len(plan.input_ids), len(plan.rows))
        assert room.peak(lambda plan=plan: decoder._run(plan)) <= wanted
        assert room.fits(wanted)
    torch.cuda.empty_cache()
