"""Layers on tokens alone give what padded ones give, for each family whose attention goes through the interface."""

import numpy as np
import pytest
import torch
import transformers

from backend.compute.encoders.attention import Spread, packable, packed
from backend.compute.encoders.buckets import Bucket
from backend.compute.encoders.packing import Layout, Packing

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"vocab_size": 100, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DISTIL = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100, "max_position_embeddings": 64}
MODERN = {"global_attn_every_n_layers": 3, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
FAMILIES = {
    "bert": SMALL,
    "roberta": SMALL | {"pad_token_id": 1},
    "xlm-roberta": SMALL | {"pad_token_id": 1},
    "camembert": SMALL | {"pad_token_id": 1},
    "electra": SMALL | {"embedding_size": 32},
    "distilbert": DISTIL,
    "modernbert": SMALL | MODERN,
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
}
LENGTHS = torch.tensor([19, 3, 7, 1])
SHAPE = (4, 19)
MASK = torch.arange(19) < LENGTHS[:, None]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def model_and_ids(family, auto):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = getattr(transformers, auto).from_config(config).eval()
    model.config.use_cache = False
    ids = torch.randint(5, 90, SHAPE).masked_fill(~MASK, config.pad_token_id)
    return model, ids


@torch.inference_mode()
def values(model, ids):
    output = model(input_ids=ids, attention_mask=MASK.long())[0]
    return output * MASK[..., None] if output.shape[:2] == SHAPE else output


def enter(packing, bucket=None):
    exact = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0)).int()
    starts = torch.from_numpy(bucket.starts(LENGTHS.numpy())) if bucket else exact
    packing.enter(Layout(*SHAPE, MASK.flatten().nonzero()[:, 0], starts, bucket))


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForTokenClassification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_padded(family, auto):
    model, ids = model_and_ids(family, auto)
    expected = values(model, ids)
    enter(Packing(model))
    assert (values(model, ids) - expected).abs().max() < 1e-5


def test_a_head_that_takes_the_first_token():
    model, ids = model_and_ids("roberta", "AutoModelForSequenceClassification")
    expected = values(model, ids)
    enter(Packing(model))
    assert (values(model, ids) - expected).abs().max() < 1e-5


def test_layers_see_no_padding():
    model, ids = model_and_ids("bert", "AutoModel")
    seen = []
    enter(Packing(model))
    model.encoder.layer[1].attention.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape))
    values(model, ids)
    assert seen == [(1, 30, 32)]


def test_removed_it_leaves_no_trace():
    model, ids = model_and_ids("bert", "AutoModel")
    expected = values(model, ids)
    Packing(model).remove()
    assert torch.equal(values(model, ids), expected)


def test_a_model_that_computes_between_its_layers_is_refused():
    model, ids = model_and_ids("bert", "AutoModel")
    enter(Packing(model))
    model.encoder.layer[1].register_forward_pre_hook(lambda layer, args: (args[0] * 2, *args[1:]))
    with pytest.raises(RuntimeError, match="between its layers"):
        values(model, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_filled_up_and_repeated_is_padded(family):
    """The same tensors computed again, as a graph does: what a batch brings must have been copied into them."""
    model, ids = model_and_ids(family, "AutoModel")
    other = torch.where(MASK, 90 - ids.clamp(5, 85), ids)
    expected = [values(model, ids), values(model, other)]
    packing, captured = Packing(model), []
    graphs = packing.graph(128, lambda compute: captured.append(compute) or compute, bool)
    enter(packing, Bucket(128, 128, 8))
    for given, wanted in zip([ids, ids, other, ids], [expected[at] for at in (0, 0, 1, 0)], strict=True):
        assert (values(model, given) - wanted).abs().max() < 1e-5
    assert graphs.count == len(captured) == 1


def test_layers_called_otherwise_than_captured_run_as_they_are():
    model, ids = model_and_ids("bert", "AutoModel")
    packing, captured = Packing(model), []
    packing.graph(128, lambda compute: captured.append(compute) or compute, bool)
    enter(packing, Bucket(128, 128, 8))
    expected = values(model, ids)
    values(model, ids)
    captured.clear()
    seen = []
    model.encoder.layer[0].attention.register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape[1]))
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=MASK.long(), sliding_window=99)[0] * MASK[..., None]
    assert seen == [30] and not captured
    assert (found - expected).abs().max() < 1e-5


def test_what_it_does_not_know_is_refused():
    heads = torch.zeros(1, 2, 3, 8)
    spread = Spread(torch.tensor([0, 3], dtype=torch.int32), 3)
    with pytest.raises(RuntimeError, match="softcap"):
        packed(torch.nn.Identity(), heads, heads, heads, spread, softcap=3.0)
    with pytest.raises(RuntimeError, match="outside"):
        packed(torch.nn.Identity(), heads, heads, heads, None)


def test_sequences_attend_to_themselves_alone():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(10, 2, 8, generator=generator) for _ in range(3))
    both = Spread(torch.tensor([0, 4, 10], dtype=torch.int32), 6).attend(query, key, value, None, (-1, -1))
    alone = Spread(torch.tensor([0, 6], dtype=torch.int32), 6).attend(query[4:], key[4:], value[4:], None, (-1, -1))
    np.testing.assert_allclose(both[4:].numpy(), alone.numpy(), atol=1e-6)


def test_who_can_be_packed():
    bert, _ = model_and_ids("bert", "AutoModel")
    assert packable(type(bert), bert.config, torch.bfloat16) and not packable(type(bert), bert.config, torch.float32)
    odd = transformers.BertConfig(hidden_size=36, num_attention_heads=3)
    assert not packable(type(bert), odd, torch.float16)
    mpnet = transformers.MPNetModel
    assert not packable(mpnet, transformers.MPNetConfig(), torch.float16)
