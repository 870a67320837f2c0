"""Models whose weights are packed as they are read: on one rank and two, what is refused, and the memory it takes."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from rank_processes import Ranks
from tiny_encoders import write as write_encoder

ROOT = Path(__file__).parents[3]
SETTINGS = {
    "int8": {"quantization": "int8"},
    "int8 asymmetric": {"quantization": "int8", "quantization_symmetric": False},
    "int4": {"quantization": "int4", "quantization_group": 64},
    "int4 symmetric": {"quantization": "int4", "quantization_symmetric": True},
    "fp8": {"quantization": "fp8"},
}
LLAMA = {
    "vocab_size": 131,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
}
"""Heads uneven on two ranks; columns of the last projections 192 = 128 + 64 and 256."""
TOKENS = torch.arange(3, 33)[None]


def write(folder, family="llama", **settings):
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **(LLAMA | settings))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.08)
    model.save_pretrained(folder)
    return folder


def computed(folder, rank, world, dtype=torch.float32, merge=True, **settings):
    """Logits, bytes of packed weights, and what a full model of the very same rounded weights gives on one rank."""
    from backend.compute.load import load
    from backend.compute.quantized.layer import packed_weights
    from backend.config import EngineConfig

    config = EngineConfig(model=str(folder), **settings)
    model = load(config, rank, world, torch.device("cpu"), dtype, attention="eager", merge=merge)
    with torch.inference_mode():
        logits = model(TOKENS, use_cache=False).logits
    full = {name: weight.full() for name, weight in packed_weights(model).items()}
    return logits, full if world == 1 else {name: value.shape for name, value in full.items()}


def encoded(folder, auto, world, **settings):
    from backend.compute.encoders.load import load_encoder
    from backend.compute.quantized.layer import packed_weights
    from backend.compute.quantized.scheme import scheme_of
    from backend.config import EngineConfig
    from backend.model_folder import Checkpoint

    scheme = scheme_of(EngineConfig(model=str(folder), **settings))
    model = load_encoder(Checkpoint.open(Path(folder)), auto, world, torch.device("cpu"), torch.float32, scheme)
    with torch.inference_mode():
        return model(TOKENS).logits, {name: weight.full() for name, weight in packed_weights(model).items()}


def all_computed(rank, world, llama, bert):
    from backend.errors import LoadError

    found = {name: computed(llama, rank, world, **given)[0] for name, given in SETTINGS.items()}
    masked = "AutoModelForMaskedLM"
    found |= {f"bert {name}": encoded(bert, masked, world, **given)[0] for name, given in SETTINGS.items()}
    try:
        computed(llama, rank, world, quantization="int4", quantization_group=128)
    except LoadError as error:
        found["cut"] = str(error)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    write_encoder(folder, "bert", "AutoModelForMaskedLM", hidden_size=128, intermediate_size=256)
    return folder


@pytest.fixture(scope="module")
def split(llama, bert):
    """What each of two ranks computed."""
    return Ranks(2, all_computed, llama, bert).results()


@pytest.fixture(scope="module")
def alone(llama):
    return cache(lambda name: computed(llama, 0, 1, **SETTINGS[name]))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_packed_model_is_the_full_one_of_its_rounded_weights(name, llama, alone):
    logits, full = alone(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        unrounded = model(TOKENS, use_cache=False).logits
        missing = model.load_state_dict(full, strict=False)
        assert not missing.unexpected_keys
        want = model(TOKENS, use_cache=False).logits
    assert len(full) == 14  # seven projections of two layers
    torch.testing.assert_close(logits, want, atol=2e-4, rtol=0)
    assert (logits - unrounded).abs().max() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_compute_what_one_does(name, alone, split):
    for rank in split:
        torch.testing.assert_close(rank[name], alone(name)[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_merged_projections_compute_what_single_ones_do(name, llama, alone):
    apart, _ = computed(llama, 0, 1, merge=False, **SETTINGS[name])
    torch.testing.assert_close(alone(name)[0], apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_encoders(name, bert, split):
    model = transformers.AutoModelForMaskedLM.from_pretrained(bert)
    logits, full = encoded(bert, "AutoModelForMaskedLM", 1, **SETTINGS[name])
    with torch.inference_mode():
        unrounded = model(TOKENS).logits
        model.load_state_dict(full, strict=False)
        want = model(TOKENS).logits
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)
    assert (logits - unrounded).abs().max() > 1e-3
    for rank in split:
        torch.testing.assert_close(rank[f"bert {name}"], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_half_precision(kind, llama):
    logits, full = computed(llama, 0, 1, dtype=torch.bfloat16, quantization=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16, attn_implementation="eager")
    model.load_state_dict(full, strict=False)
    with torch.inference_mode():
        want = model(TOKENS, use_cache=False).logits.float()
    assert float((logits.float() - want).abs().mean()) < 0.03 * float(want.std())


def test_widths_that_groups_do_not_divide_are_refused_by_layer_and_key(tmp_path, llama, split):
    from backend.errors import LoadError

    with pytest.raises(LoadError, match=r"layers\.0\.self_attn\.\w+ takes 192 columns.*128.*quantization_group"):
        computed(llama, 0, 1, quantization="int4", quantization_group=128)
    assert all("quantization_group" in rank["cut"] for rank in split)
    odd = write(tmp_path / "odd", intermediate_size=144)
    with pytest.raises(LoadError, match=r"down_proj takes 144 columns, which groups of 32 do not divide"):
        computed(odd, 0, 1, quantization="int4")


def test_experts_are_refused(tmp_path):
    from backend.errors import LoadError

    folder = write(tmp_path / "experts", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(LoadError, match=r"quantization: model\.layers\.0\.\S+ is not a linear layer's"):
        computed(folder, 0, 1, quantization="int8")


GROWTH = """
import sys, torch
from backend.compute.load import load
from backend.config import EngineConfig
def own(): return [int(x) for x in open("/proc/self/statm").read().split()[1:3]]
import threading
device = torch.device("cpu")
def go(path):
    config = EngineConfig(model=path, quantization=sys.argv[3])
    return load(config, 0, 1, device, torch.float32, attention="eager")
torch.set_num_threads(1)
go(sys.argv[1])  # imports
highest, done = 0, threading.Event()
def watch():
    global highest
    while not done.wait(0.0005):
        resident, shared = own()
        highest = max(highest, resident - shared)
before = own(); before = before[0] - before[1]
watcher = threading.Thread(target=watch); watcher.start()
model = go(sys.argv[2])
done.set(); watcher.join()
print((highest - before) * 4096)
"""


@pytest.mark.parametrize("kind", ["int4"])
def test_the_full_model_is_never_in_memory(kind, llama, tmp_path):
    """150 MB in float32, packed 21 MB: the process grows by that, one tensor and what rounding a part of it takes."""
    large = write(tmp_path / "large", hidden_size=576, intermediate_size=2304, num_hidden_layers=7, head_dim=192)
    stored = (large / "model.safetensors").stat().st_size
    assert stored > 120e6
    command = [sys.executable, "-c", GROWTH, str(llama), str(large), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 0.6 * stored
