"""Which forms of checkpoints that are quantized already are served."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from backend.errors import LoadError
from backend.quantized_form import Form, form_of

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
