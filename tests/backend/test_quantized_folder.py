"""Which forms of checkpoints that are quantized already are served, and the layers that their tensors make."""

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
from backend.quantized_folder import Form, form_of, layers
from backend.tasks import find

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

from quantized_folders import CHANNEL, CONFIGS, FLOAT, INT, compressed

FORMS = {
    "gptq 4": Form("gptq", "int4", 32, symmetric=False),
    "gptq 4 symmetric": Form("gptq", "int4", 32),
    "gptq 8 whole rows": Form("gptq", "int8", 0, symmetric=False),
    "gptq scattered": Form("gptq", "int4", 32, symmetric=False, ordered=True),
    "gptq v2": Form("gptq_v2", "int4", 32, symmetric=False),
    "awq": Form("awq", "int4", 32, symmetric=False),
    "packed int4": Form("packed", "int4", 32),
    "packed int4 asymmetric": Form("packed", "int4", 32, symmetric=False),
    "packed int8": Form("packed", "int8"),
    "int8": Form("plain", "int8"),
    "int8 asymmetric": Form("plain", "int8", symmetric=False),
    "fp8": Form("plain", "fp8"),
    "fp8 tensor": Form("plain", "fp8", rows=0),
    "fp8 blocks": Form("blocks", "fp8", 32, rows=48),
}
TWO = compressed("pack-quantized", INT)
TWO["config_groups"]["group_1"] = {"weights": CHANNEL}
GPTQ, AWQ, FP8 = CONFIGS["gptq 4"], CONFIGS["awq"], CONFIGS["fp8 blocks"]


@pytest.mark.parametrize("name", CONFIGS)
def test_served_forms(name: str) -> None:
    assert form_of({"quantization_config": CONFIGS[name]}) == FORMS[name]
    assert form_of({"compression_config": CONFIGS[name]}) == FORMS[name]


def test_others_are_as_they_are() -> None:
    assert form_of({"quantization_config": None}) is None
    tensors = {"a.weight": Tensor("a.weight", "F32", (2, 2), Path())}
    assert layers({}, tensors) == tensors


REFUSED: list[tuple[Any, str]] = [
    ({}, "quant_method None is not served; known: gptq, awq, compressed-tensors, fp8"),
    ("gptq", "quant_method None"),
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
    (GPTQ | {"bits": 3}, "gptq: bits 3 is not served; served: 4, 8"),
    (GPTQ | {"group_size": 12}, "gptq: group_size 12"),
    (GPTQ | {"group_size": None}, "gptq: group_size None"),
    (GPTQ | {"checkpoint_format": "marlin"}, "gptq: format 'marlin'"),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
    (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "gptq: dynamic"),
    (AWQ | {"bits": 8}, "awq: bits 8"),
    (AWQ | {"version": "GEMV"}, "awq: version 'gemv'"),
    (AWQ | {"zero_point": False}, "awq: zero_point false"),
    (FP8 | {"scale_fmt": "ue8m0"}, "fp8: scale_fmt 'ue8m0'"),
    (FP8 | {"weight_block_size": [128]}, r"fp8: weight_block_size \[128\]"),
    (FP8 | {"modules_to_convert": ["embed"]}, "fp8: modules_to_convert"),
    (compressed("dense", INT), "format 'dense'"),
    (compressed("nvfp4-pack-quantized", INT), "format 'nvfp4-pack-quantized'"),
    (compressed("pack-quantized", INT | {"num_bits": 3}), "pack-quantized of 3 bits"),
    (compressed("pack-quantized", INT | {"actorder": "group"}), "actorder 'group'"),
    (compressed("int-quantized", CHANNEL | {"strategy": "token"}), "strategy 'token'"),
    (compressed("float-quantized", FLOAT | {"num_bits": 4}), "floats of 4 bits"),
    (compressed("float-quantized", FLOAT | {"strategy": "block"}), "block_structure None"),
    (compressed("pack-quantized", INT) | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    (compressed("pack-quantized", INT) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    (compressed("pack-quantized", INT) | {"config_groups": {}}, "config_groups is missing"),
    (TWO, "config_groups of several forms"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_what_is_not_served_is_named(config: Any, words: str) -> None:
    with pytest.raises(LoadError, match=f"quantization_config: .*{words}"):
        form_of({"quantization_config": config})


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
    assert (weight.shape, weight.dtype, weight.form) == ((96, 64), "F16", FORMS["gptq 4"])
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
