"""Checkpoints that are quantized already give the logits of the full weights that their codes mean."""

import json
import os
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from quantized_folders import CONFIGS, write
from rank_processes import Ranks
from tiny_encoders import write as write_encoder

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(3, 33)[None]
SPLIT = ("gptq 4", "gptq 8 whole rows", "awq", "packed int4 asymmetric", "fp8 blocks", "int8 asymmetric")


@pytest.fixture(autouse=True)
def environment():
    """DeepSpeed in this process sets variables."""
    with patch.dict(os.environ):
        yield


def plain(folder, **changes):
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes)).save_pretrained(folder)
    return folder


def loaded(folder, rank=0, world=1, dtype=torch.float32, **settings):
    from backend.compute.load import load
    from backend.config import EngineConfig

    return load(EngineConfig(model=str(folder), **settings), rank, world, torch.device("cpu"), dtype, attention="eager")


def logits(model):
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Form -> its folder, the plain one and the full weights."""
    scratch = tmp_path_factory.mktemp("checkpoints")
    base = plain(scratch / "plain")

    @cache
    def made(name):
        return scratch / name, base, write(scratch / name, name, base)

    return made


def reference(base, full):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict({name: value.float() for name, value in full.items()}, strict=False)
    return logits(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_memory(name, folders):
    from backend.compute.footprint import footprint
    from backend.compute.quantized.layer import packed_weights
    from backend.config import EngineConfig
    from backend.fit import check

    folder, base, full = folders(name)
    model = loaded(folder)
    packed = packed_weights(model)
    assert packed.keys() == full.keys()
    for key, value in packed.items():
        assert torch.equal(value.full(), full[key].float()), key
    want = reference(base, full)
    assert (logits(model) - want).abs().max() < 1e-5 * want.abs().max()
    fit = check(EngineConfig(model=str(folder), device="cpu"))
    assert footprint(model) == pytest.approx(fit.weights, rel=0.05)
    assert f"{fit.quantization} weights" in fit.report()[0]


@pytest.mark.parametrize("name", ["gptq scattered", "packed int8", "fp8"])
def test_in_half_precision_weights_are_rounded_once(name, folders):
    from backend.compute.quantized.layer import packed_weights

    folder, _, full = folders(name)
    for key, value in packed_weights(loaded(folder, dtype=torch.bfloat16)).items():
        assert torch.equal(value.full(), full[key].bfloat16())


def joined_projections(scratch, family):
    """A family whose gate and up (and queries, keys, values) are one matrix; its quantized folder and full weights."""
    config = transformers.AutoConfig.for_model(family, **SHAPE, head_dim=32, pad_token_id=0)
    torch.manual_seed(2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(scratch / f"plain {family}")
    return scratch / family, scratch / f"plain {family}", write(scratch / family, "gptq 4", scratch / f"plain {family}")


def test_joined_projections(tmp_path):
    folder, *rest = joined_projections(tmp_path, "phi3")
    want = reference(*rest)
    assert (logits(loaded(folder)) - want).abs().max() < 1e-5 * want.abs().max()


def all_logits(rank, world, folders):
    return {name: logits(loaded(path, rank, world)) for name, path in folders.items()}


def test_two_ranks_compute_what_one_does(folders, tmp_path):
    found = {name: folders(name) for name in SPLIT} | {"glm4": joined_projections(tmp_path, "glm4")}
    paths = {name: folder for name, (folder, _, _) in found.items()}
    computed = Ranks(2, all_logits, paths).results()
    for name, (_, base, full) in found.items():
        want = reference(base, full)
        for rank in computed:
            assert (rank[name] - want).abs().max() < 2e-5 * want.abs().max(), name


def changed(folder, target, change):
    """A copy of a folder with other tensors."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_layers_that_are_left_as_they_are(folders, tmp_path):
    """`ignore`: told by the tensors that are there. A quantized head, which lies outside the blocks, is made full."""
    from backend.compute.quantized.layer import packed_weights

    folder, base, full = folders("awq")
    name, head = "model.layers.1.self_attn.o_proj", "model.layers.0.self_attn.q_proj"

    def change(tensors):
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = full[f"{name}.weight"].float()

    model = loaded(changed(folder, tmp_path / "one", change))
    assert packed_weights(model).keys() == full.keys() - {f"{name}.weight"}
    want = reference(base, full)
    assert (logits(model) - want).abs().max() < 1e-5 * want.abs().max()

    def with_head(tensors):
        del tensors["lm_head.weight"]
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"lm_head.{part}"] = tensors[f"{head}.{part}"].clone()

    target = changed(folder, tmp_path / "head", with_head)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"vocab_size": 128}))
    tensors = load_file(target / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:128].clone()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(loaded(target).lm_head.weight, full[f"{head}.weight"].float())


def test_biases_that_the_model_does_not_have(folders, tmp_path):
    """Some libraries store them, of zeros."""
    from backend.errors import LoadError

    name = "model.layers.0.self_attn.q_proj.bias"
    folder, *rest = folders("gptq 4")
    zeros = loaded(changed(folder, tmp_path / "zeros", lambda tensors: tensors.update({name: torch.zeros(128)})))
    want = reference(*rest)
    assert (logits(zeros) - want).abs().max() < 1e-5 * want.abs().max()
    with pytest.raises(LoadError, match=f"{name}.*has no place"):
        loaded(changed(folder, tmp_path / "ones", lambda tensors: tensors.update({name: torch.ones(128)})))


def test_encoders(tmp_path):
    from transformers import AutoModelForMaskedLM

    from backend.compute.encoders.load import load_encoder
    from backend.compute.quantized.layer import packed_weights
    from backend.model_folder import Checkpoint

    write_encoder(tmp_path / "plain", "bert", "AutoModelForMaskedLM", hidden_size=64, intermediate_size=128)
    full = write(tmp_path / "awq", "awq", tmp_path / "plain", layers=r"\.layer\..*(query|key|value|dense)\.weight$")
    model = load_encoder(
        Checkpoint.open(tmp_path / "awq"), "AutoModelForMaskedLM", 1, torch.device("cpu"), torch.float32
    )
    want = AutoModelForMaskedLM.from_pretrained(tmp_path / "plain")
    want.load_state_dict({name: value.float() for name, value in full.items()}, strict=False)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS).logits, want.eval()(TOKENS).logits, atol=1e-4, rtol=0)
    assert packed_weights(model).keys() == full.keys()


def test_layers_that_are_not_linear_are_refused(tmp_path):
    from backend.errors import LoadError

    config = transformers.MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "plain")
    write(tmp_path / "awq", "awq", tmp_path / "plain", layers=r"experts\.\d+\.w\d\.weight$")
    with pytest.raises(LoadError, match=r"experts\.0\.w\d\.weight is quantized, and .* is not a linear layer's weight"):
        loaded(tmp_path / "awq")


def scattered(tensors):
    key = "model.layers.0.self_attn.q_proj.g_idx"
    tensors[key] = tensors[key].flip(0)


def uncentred(tensors):
    tensors["model.layers.0.self_attn.q_proj.qzeros"] += 1


def endless(tensors):
    tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = torch.inf


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [("gptq 4", scattered, "g_idx does not put columns into groups"),
     ("gptq 4 symmetric", uncentred, "not all 8, though.*sym"),
     ("awq", endless, "no numbers")],
)  # fmt: skip
def test_contents_that_would_not_give_the_model_are_refused(name, change, words, folders, tmp_path):
    from backend.errors import LoadError

    with pytest.raises(LoadError, match=rf"layers\.0\.self_attn\.q_proj.*{words}"):
        loaded(changed(folders(name)[0], tmp_path / "changed", change))


def test_they_are_not_quantized_again(folders):
    from backend.config import EngineConfig
    from backend.errors import LoadError
    from backend.fit import check

    folder = folders("awq")[0]
    with pytest.raises(LoadError, match="quantized already"):
        loaded(folder, quantization="int8")
    with pytest.raises(LoadError, match=r"quantization int8: the checkpoint is quantized already \(int4\)"):
        check(EngineConfig(model=str(folder), device="cpu", quantization="int8"))


def test_scattered_groups_are_not_split(folders):
    from backend.config import EngineConfig
    from backend.errors import LoadError
    from backend.fit import check

    with pytest.raises(LoadError, match=r"desc_act with groups cannot be split.*tensor_parallel 1"):
        check(EngineConfig(model=str(folders("gptq scattered")[0]), device="cpu", tensor_parallel=2))
