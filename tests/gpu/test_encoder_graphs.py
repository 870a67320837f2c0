"""Packed layers as CUDA graphs give what they give launched one by one, and what padded ones give."""

import os
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from tiny_encoders import write

from backend.compute.encoders.attention import Spread
from backend.compute.encoders.buckets import Bucket
from backend.compute.encoders.encoder import Encoder
from backend.compute.encoders.graphs import Capture
from backend.compute.encoders.packing import Layout, Packing
from backend.config import EngineConfig
from backend.ranks.rank import Birth
from backend.tasks.service import Service
from backend.tasks.text import Piece, Texts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]

BERT = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=1000)
FAMILIES = {
    "bert": BERT,
    "distilbert": dict(dim=256, n_layers=4, n_heads=4, hidden_dim=512, vocab_size=1000),
    "modernbert": BERT | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    | dict(global_attn_every_n_layers=3, local_attention=32),
    "qwen3": BERT | dict(num_key_value_heads=2, head_dim=64),
}  # fmt: skip


def layout_of(lengths, bucket=None):
    mask = np.arange(lengths.max()) < lengths[:, None]
    places = torch.from_numpy(np.flatnonzero(mask)).cuda()
    starts = bucket.starts(lengths) if bucket else np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Layout(*mask.shape, places, torch.from_numpy(starts).cuda(), bucket), torch.from_numpy(mask).cuda()


def batch_of(seed, count, most):
    chance = np.random.default_rng(seed)
    return chance.integers(1, most, count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_replayed_is_packed_and_padded(family, dtype):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = transformers.AutoModel.from_config(config).eval().to("cuda", dtype)
    model.config.use_cache = False
    packing, error = None, {torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    lengths = [batch_of(0, 20, 100), batch_of(1, 20, 100), batch_of(2, 3, 300), batch_of(3, 3, 300)]
    given = [torch.randint(3, 1000, (len(each), int(each.max())), device="cuda") for each in lengths]

    def compute(ids, layout, mask):
        if packing:
            packing.enter(layout)
        return model(input_ids=ids, attention_mask=mask.long())[0].float() * mask[..., None]

    padded = [compute(ids, *layout_of(each)) for ids, each in zip(given, lengths, strict=True)]
    packing = Packing(model)
    packed = [compute(ids, *layout_of(each)) for ids, each in zip(given, lengths, strict=True)]
    graphs = packing.graph(2048, Capture(), bool)
    for _ in range(3):
        for ids, each, plain, wide in zip(given, lengths, packed, padded, strict=True):
            found = compute(ids, *layout_of(each, Bucket.of(each)))
            scale = float(wide.abs().max())
            assert float((found - plain).abs().max()) <= error * scale
            assert float((found - wide).abs().max()) <= error * scale
    assert graphs.count == len({Bucket.of(each) for each in lengths}) and not graphs.failed


@torch.inference_mode()
def test_a_replay_is_what_the_same_launches_give():
    """Bit for bit, on tensors filled up alike."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("bert", **BERT)
    model = transformers.AutoModel.from_config(config).eval().to("cuda", torch.float16)
    packing, lengths = Packing(model), batch_of(4, 24, 120)
    bucket = Bucket.of(lengths)
    packing.graph(2048, Capture(), bool)
    layout, mask = layout_of(lengths, bucket)
    packing.enter(layout)
    first, second = (torch.randint(3, 1000, tuple(mask.shape), device="cuda") for _ in range(2))
    launched = [model(input_ids=first, attention_mask=mask.long())[0] for _ in range(2)][1]  # the one that is captured
    model(input_ids=second, attention_mask=mask.long())
    assert torch.equal(model(input_ids=first, attention_mask=mask.long())[0], launched)


def test_sequences_of_no_tokens_cost_nothing_else():
    """Varlen attention as graphs use it: fillers, empty sequences, and a bound above the longest."""
    torch.manual_seed(0)
    merged = torch.randn(256, 3, 4, 64, device="cuda", dtype=torch.float16)
    query, key, value = merged.unbind(1)  # views, as slices of a merged projection are
    lengths = np.array([50, 1, 120])
    bucket = Bucket(256, 128, 16)
    starts = torch.from_numpy(bucket.starts(lengths)).cuda()
    found = Spread(starts, 128).attend(query, key, value, None, (-1, -1))[:171]
    exact = Spread(starts[:4], 120).attend(*(each[:171].contiguous() for each in (query, key, value)), None, (-1, -1))
    assert torch.equal(found, exact)


def worker_of(folder, tmp_path, said, graphs):
    config = EngineConfig(model=str(folder), device="cuda", dtype="float16", step_tokens=1024, cuda_graphs=graphs)
    return Encoder(Birth("", config, 0, 1, str(tmp_path), os.getpid(), "embed"), said.append)


def test_the_worker_says_so_and_answers_alike(tmp_path):
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    folder, said = write(tmp_path / "model", "bert", "AutoModel", **shape), []
    workers = [worker_of(folder, tmp_path, said, graphs) for graphs in (False, True)]
    assert said[-1] == "layers run as CUDA graphs"
    chance = np.random.default_rng(0)
    for worker in workers:
        assert 0 < worker.warm_up().proof < 0.05
    for _ in range(12):
        lengths = chance.integers(1, 64, chance.integers(1, 20))
        batch = Texts.of(
            [
                Piece(chance.integers(5, 60, length).astype(np.int32), np.zeros(length, np.int32), {"pooling": "mean"})
                for length in lengths
            ]
        )
        plain, graphed = (np.stack(worker.forward(batch)()) for worker in workers)
        np.testing.assert_allclose(graphed, plain, atol=5e-3 * np.abs(plain).max())


class Ask:
    """A request of some texts."""

    request_id = ""

    def __init__(self, texts):
        self._texts, self.outcome = texts, Future()

    def parameters(self):
        return {}

    def cancelled(self):
        return False

    def rows(self):
        return [{"text": text.encode()} for text in self._texts]

    def answer(self, outputs):
        self.outcome.set_result(outputs)

    def fail(self, error):
        self.outcome.set_exception(error)


def vectors(folder, texts, **parameters):
    given = {"model": str(folder), "device": "cuda", "dtype": "float16", "step_tokens": "512", **parameters}
    said = []
    service = Service("embed", EngineConfig.from_parameters(given), report=said.append)
    service.start()
    try:
        found = []
        for _ in range(4):  # launched, captured, replayed twice
            ask = Ask(texts)
            service.serve([ask])
            found.append(ask.outcome.result(120)["embedding"])
        return said, found
    finally:
        service.close()


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_replay_together(tmp_path, world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"{world} GPUs needed")
    folder = write(tmp_path / "model", "bert", "AutoModel", hidden_size=128, num_attention_heads=4, num_hidden_layers=3)
    texts = ["the quick brown fox", "rivers", "Anna Smith of Berlin writes to the United Nations", "good film"] * 5
    _, plain = vectors(folder, texts, cuda_graphs="false")
    said, found = vectors(folder, texts, tensor_parallel=str(world))
    assert any("run as CUDA graphs" in line for line in said), said
    for each in found:
        np.testing.assert_allclose(each, plain[0], atol=2e-2)
