"""Layers of checkpoints that are quantized already, made of their tensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from backend.config import EngineConfig
from backend.errors import LoadError
from backend.model_folder import Tensor
from backend.quantized_folder import layers
from backend.quantized_form import form_of
from backend.tasks import find

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from quantized_folders import CONFIGS

GPTQ, AWQ = CONFIGS["gptq 4"], CONFIGS["awq"]


def tensors(*given: tuple[str, str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: Tensor(name, kind, shape, Path()) for name, kind, shape in given}


PARTS = tensors(
    ("norm.weight", "F16", (64,)), ("a.qweight", "I32", (8, 96)), ("a.qzeros", "I32", (2, 12)),
    ("a.scales", "F16", (2, 96)), ("a.g_idx", "I32", (64,)), ("a.bias", "F16", (96,)),
)  # fmt: skip


def test_a_layer_is_one_weight() -> None:
    found = layers({"quantization_config": GPTQ}, PARTS)
    assert set(found) == {"norm.weight", "a.weight", "a.bias"}
    weight = found["a.weight"]
    assert (weight.shape, weight.dtype, weight.form) == ((96, 64), "F16", form_of({"quantization_config": GPTQ}))
    assert weight.bytes == 8 * 96 * 4 + 2 * 12 * 4 + 2 * 96 * 2 + 64 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("a.qzeros", "I32", (2, 96))], r"a\.qzeros is \[2, 96\], not \[2, 12\]"),
        ([("a.scales", "F16", (96, 2))], r"a\.scales is \[96, 2\]"),
        ([("a.scales", "F8_E8M0", (2, 96))], "a: scales of type F8_E8M0"),
        ([("a.qweight", "I32", (9, 96))], "a: groups of 32 columns do not divide 72"),
        ([("a.qweight", "I64", (8, 96))], "a: codes are I64"),
        ([("a.qweight", "I32", (8,))], "a: qweight is missing, or no matrix"),
        ([("a.qweight", "I32", (0, 96))], "a: groups of 32"),
    ],
)
def test_layers_whose_tensors_do_not_fit_together(changes: list[Any], words: str) -> None:
    with pytest.raises(LoadError, match=f"quantization_config: {words}|{words}"):
        layers({"quantization_config": GPTQ}, PARTS | tensors(*changes))


def test_tensors_of_a_checkpoint_that_is_not_quantized_stay_as_they_are() -> None:
    assert layers({}, PARTS) == PARTS


@pytest.mark.parametrize(
    ("name", "shape", "served"),
    [
        ("fp8", (), False),
        ("fp8", (96,), True),
        ("fp8", (96, 1), True),
        ("fp8", (1, 96), False),
        ("fp8 tensor", (), True),
        ("fp8 tensor", (1,), True),
        ("fp8 tensor", (1, 1), True),
        ("fp8 tensor", (96,), False),
    ],
)
def test_scales_of_whole_rows_and_tensors_may_have_fewer_dimensions(
    name: str, shape: tuple[int, ...], served: bool
) -> None:
    given = tensors(("a.weight", "F8_E4M3", (96, 64)), ("a.weight_scale", "F16", shape))
    if served:
        assert layers({"quantization_config": CONFIGS[name]}, given)["a.weight"].shape == (96, 64)
        return
    with pytest.raises(LoadError, match=r"a\.weight_scale is \["):
        layers({"quantization_config": CONFIGS[name]}, given)


@pytest.mark.parametrize("lost", ["a.qzeros", "a.scales"])
def test_layers_that_lack_a_tensor(lost: str) -> None:
    with pytest.raises(LoadError, match=lost[2:]):
        layers({"quantization_config": GPTQ}, {name: part for name, part in PARTS.items() if name != lost})


def test_a_checkpoint_without_any_such_layer() -> None:
    with pytest.raises(LoadError, match="holds no quantized layer"):
        layers({"quantization_config": AWQ}, tensors(("a.weight", "F16", (2, 2))))


def test_clip_that_is_quantized_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "quantization_config": AWQ}))
    parts = {"qweight": np.zeros((32, 1), np.int32), "qzeros": np.zeros((1, 1), np.int32)}
    parts["scales"] = np.zeros((1, 8), np.float16)
    save_file({f"a.{role}": value for role, value in parts.items()}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="CLIP that is quantized already"):
        find("zero_shot_image")(tmp_path, EngineConfig(model=str(tmp_path)))
