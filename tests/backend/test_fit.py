"""What fits on which devices, by files alone; the weights forecast are those that the ranks then hold."""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_checkpoint import SHAPES, write

from backend import fit
from backend.config import EngineConfig
from backend.errors import LoadError
from backend.fit import check

GIB = 1 << 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 4 GiB without GPUs."""
    monkeypatch.setattr(fit, "_gpu_memory", list)
    monkeypatch.setattr(fit, "_host_memory", lambda: 4 * GIB)
    monkeypatch.delenv("TRITONSPEED_MODEL_ROOT", raising=False)


def refused(config: EngineConfig) -> str:
    with pytest.raises(LoadError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_environment_names_the_root(model: Path, host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSPEED_MODEL_ROOT", str(model.parent))
    assert check(EngineConfig(model="model")).model_type == "llama"
    monkeypatch.setenv("TRITONSPEED_MODEL_ROOT", str(model))
    assert "leads out" in refused(EngineConfig(model="../model2"))


def test_a_fit_on_the_host(model: Path, host: None) -> None:
    found = check(EngineConfig(model=str(model), tensor_parallel=2))
    assert (found.device, found.dtype, found.ranks, found.heads) == ("cpu", "float32", 2, (2, 1))
    assert found.kv_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads of the larger rank, dim, bytes
    assert found.weights < 4 * sum(prod(shape) for shape in SHAPES.values())
    assert found.free == 2 * GIB
    assert found.max_model_len == 128
    report = " ".join(found.report())
    assert all(word in report for word in ("llama", "2+1", "KV cache", "128 tokens"))


def test_devices_are_counted(model: Path, host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no NVIDIA GPU" in refused(EngineConfig(model=str(model), device="cuda"))
    monkeypatch.setattr(fit, "_gpu_memory", lambda: [8 * GIB, 6 * GIB])
    found = check(EngineConfig(model=str(model), tensor_parallel=2))
    assert (found.device, found.dtype, found.free) == ("cuda", "bfloat16", 6 * GIB)
    assert "needs as many GPUs; 2 are visible" in refused(EngineConfig(model=str(model), tensor_parallel=3))
    assert check(EngineConfig(model=str(model), tensor_parallel=3, device="cpu")).device == "cpu"


def test_memory_is_counted(model: Path, host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GiB is free" in refused(EngineConfig(model=str(model), num_blocks=1_000_000))
    needed = check(EngineConfig(model=str(model))).needed
    monkeypatch.setattr(fit, "_host_memory", lambda: GIB // 4)
    assert "0.25 GiB is free" in refused(EngineConfig(model=str(model)))
    monkeypatch.setattr(fit, "_host_memory", lambda: needed + 30_000)
    config = EngineConfig(model=str(model), kv_cache_fraction=0.5, max_model_len=128)
    assert "max_model_len is 128" in refused(config)


def test_lengths_are_checked(model: Path, host: None) -> None:
    assert check(EngineConfig(model=str(model), max_model_len=64)).max_model_len == 64
    assert "129 is more than the model's 128" in refused(EngineConfig(model=str(model), max_model_len=129))
    write(model, max_position_embeddings=None)
    assert "set max_model_len" in refused(EngineConfig(model=str(model)))
    assert check(EngineConfig(model=str(model), max_model_len=64)).max_model_len == 64


@pytest.mark.parametrize(
    ("changes", "ranks", "reason"),
    [
        ({}, 4, "more than the model's 3 key/value heads (9 query heads)"),
        ({"model_type": "phi3"}, 2, "phi3 cannot be split over 2 ranks"),
        ({"model_type": "olmo2"}, 2, "normalises queries and keys over all heads"),
        ({"model_type": "gpt2"}, 2, "gpt2 cannot be split"),
        ({"model_type": "unheard"}, 2, "has not been shown"),
        ({"model_type": "falcon"}, 1, "falcon cannot be served"),
        ({"model_type": "bloom"}, 2, "bloom cannot be served"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, 1, "BertModel is not a causal language model"),
        ({"is_encoder_decoder": True}, 1, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, 1, "gptq: bits None is not served; served: 4, 8"),
        ({"model_type": None}, 1, "no model_type"),
        ({"num_hidden_layers": None}, 1, "no num_hidden_layers"),
    ],
)
def test_what_cannot_be_served_is_refused(
    model: Path, host: None, changes: dict[str, Any], ranks: int, reason: str
) -> None:
    write(model, **changes)
    assert reason in refused(EngineConfig(model=str(model), tensor_parallel=ranks))


@pytest.mark.parametrize("family", ["phi3", "olmo2", "gpt2", "unheard"])
def test_what_cannot_be_split_may_be_served_alone(model: Path, host: None, family: str) -> None:
    write(model, model_type=family)
    assert check(EngineConfig(model=str(model))).ranks == 1


def test_a_smaller_cache_and_smaller_weights(model: Path, host: None) -> None:
    """Of bytes a token and of linear layers alone: the embedding stays."""
    plain = check(EngineConfig(model=str(model)))
    assert check(EngineConfig(model=str(model), kv_cache_dtype="fp8")).kv_token * 4 == plain.kv_token
    linear = sum(prod(shape) for name, shape in SHAPES.items() if "layers" in name)
    rows = sum(shape[0] for name, shape in SHAPES.items() if "layers" in name)
    fp8 = check(EngineConfig(model=str(model), quantization="fp8"))
    assert plain.weights - fp8.weights == 4 * linear - (linear + 4 * rows)
    assert "fp8 weights" in fp8.report()[0]
    assert "takes 72 columns, which groups of 64 do not divide" in refused(
        EngineConfig(model=str(model), quantization="int8")
    )


def test_other_tasks_are_forecast_too(model: Path, host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders by their tensors, pipelines by those of every part."""
    encoder = check(EngineConfig(model=str(model)), "classify")
    assert encoder.weights == check(EngineConfig(model=str(model))).weights and not encoder.kv_token
    assert len(encoder.report()) == 2
    images = pipeline(model)
    (model / "vae" / "m.fp16.safetensors").write_bytes(b"a variant, not read")
    found = check(EngineConfig(model=str(model)), "text_to_image")
    assert (found.weights, found.model_type) == (2 * encoder.weights, images)
    monkeypatch.setattr(fit, "_host_memory", lambda: GIB // 4)
    for task in ("classify", "text_to_image"):
        with pytest.raises(LoadError, match=r"0\.25 GiB is free"):
            check(EngineConfig(model=str(model)), task)


def pipeline(folder: Path) -> str:
    """Lay parts of images of 64 pixels a side beside the model; the pipeline's kind."""
    kind, weights = "StableDiffusionPipeline", (folder / "model.safetensors").read_bytes()
    parts = {"unet": {"sample_size": 8}, "vae": {"block_out_channels": [4] * 4}, "scheduler": {}}
    for part, config in parts.items():
        (folder / part).mkdir()
        (folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")).write_text(
            json.dumps(config)
        )
        if part != "scheduler":
            (folder / part / "m.safetensors").write_bytes(weights)
    index = {"_class_name": kind, **{part: ["diffusers", "Any"] for part in parts}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return kind
