"""Tiny checkpoints that are quantized already, packed here by the formats' definitions, and the weights they stand for.

Codes, zero points and scales are drawn; nothing of backend is used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ: which of eight neighbours lies in the n-th four bits of a word."""
INT = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKENWISE = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "gptq 4": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False},
    "gptq 4 symmetric": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True},
    "gptq 8 whole rows": {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False, "desc_act": True},
    "gptq scattered": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True},
    "gptq v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "packed int4": compressed("pack-quantized", INT),
    "packed int4 asymmetric": compressed("pack-quantized", INT | {"symmetric": False}),
    "packed int8": compressed("pack-quantized", CHANNEL),
    "int8": compressed("int-quantized", CHANNEL, TOKENWISE | {"type": "int"}),
    "int8 asymmetric": compressed("naive-quantized", CHANNEL | {"symmetric": False}),
    "fp8": compressed("float-quantized", FLOAT, TOKENWISE | {"type": "float"}),
    "fp8 tensor": compressed("naive-quantized", FLOAT | {"strategy": "tensor"}),
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [48, GROUP], "activation_scheme": "dynamic"},
}


def write(
    folder: Path, name: str, plain: Path, scales: torch.dtype = torch.float16, layers: str = r"_proj\.weight$"
) -> dict[str, torch.Tensor]:
    """These layers of the plain model's folder in this form; the full weights that its codes mean, by name."""
    chance = np.random.default_rng(sum(name.encode()))
    tensors, full = load_file(plain / "model.safetensors"), {}
    for key in [key for key in tensors if re.search(layers, key)]:
        owner, (rows, columns) = key.removesuffix(".weight"), tensors.pop(key).shape
        parts, full[key] = layer(CONFIGS[name], chance, rows, columns, scales)
        tensors |= {f"{owner}.{part}": value.contiguous() for part, value in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": CONFIGS[name]}))
    return full


def layer(
    config: dict[str, Any], chance: Any, n: int, k: int, kind: torch.dtype
) -> tuple[dict[str, Any], torch.Tensor]:
    if config["quant_method"] == "fp8":
        return _blocks(chance, n, k, *config["weight_block_size"])
    if config["quant_method"] == "compressed-tensors":
        return _compressed(config, chance, n, k, kind)
    bits, group = config["bits"], config["group_size"] if config["group_size"] > 0 else k
    q = chance.integers(0, 1 << bits, (n, k))
    z = chance.integers(0, 1 << bits, (n, k // group))
    if config.get("sym"):
        z[:] = 1 << bits - 1
    s, full = _meant(q, z, chance, kind)
    index = torch.arange(k, dtype=torch.int32) // group
    if config.get("desc_act") and group < k:
        columns = torch.tensor(chance.permutation(k))
        q, full, index = q[:, columns], full[:, columns], index[columns]
    if config["quant_method"] == "awq":
        q, z = (x.T.reshape(x.shape[1], n // 8, 8)[..., list(ORDER)].reshape(x.shape[1], n) for x in (q, z))
        return {"qweight": words(q, 4, 1), "qzeros": words(z, 4, 1), "scales": s.T}, full
    zeros = words(z.T, bits, 1)
    if "checkpoint_format" not in config:  # version 1: less 1 in each place, by one subtraction from the word
        zeros = ((zeros.long() - int("1" * 8 if bits == 4 else "01" * 4, 16) + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    parts = {"qweight": words(q.T, bits, 0), "qzeros": zeros, "scales": s.T, "g_idx": index}
    return parts, full


def _meant(q: Any, z: Any, chance: Any, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and (q - z) * s in float64, which holds it exactly."""
    step = 0.2 / (1 << int(q.max()).bit_length())
    s = torch.tensor(step * (0.5 + chance.random(z.shape))).to(kind)
    wide = q.shape[1] // z.shape[1]
    return s, torch.tensor(q - z.repeat(wide, 1)) * s.double().repeat_interleave(wide, 1)


def _compressed(config: dict[str, Any], chance: Any, n: int, k: int, kind: torch.dtype) -> tuple[dict[str, Any], Any]:
    weights = config["config_groups"]["group_0"]["weights"]
    if weights["type"] == "float":
        return _floats(chance, n, k, 1 if weights["strategy"] == "tensor" else n, kind)
    bits, half = weights["num_bits"], 1 << weights["num_bits"] - 1
    q = chance.integers(-half, half, (n, k))
    z = chance.integers(-half, half, (n, k // weights.get("group_size", k)))
    z = z * 0 if weights["symmetric"] else z
    s, full = _meant(q, z, chance, kind)
    parts: dict[str, Any] = {"weight_scale": s}
    if config["format"] == "pack-quantized":
        parts |= {"weight_packed": words(q + half, bits, 1), "weight_shape": torch.tensor([n, k])}
        zero = words(z + half, bits, 0)
    else:
        parts |= {"weight": torch.tensor(q, dtype=torch.int8)}
        zero = torch.tensor(z, dtype=torch.int8)
    return parts if weights["symmetric"] else parts | {"weight_zero_point": zero}, full


def _floats(chance: Any, n: int, k: int, scales: int, kind: torch.dtype) -> tuple[dict[str, Any], torch.Tensor]:
    codes = torch.tensor(chance.standard_normal((n, k)) * 40).to(torch.float8_e4m3fn)
    s = torch.tensor(0.002 * (0.5 + chance.random((scales, 1)))).to(kind)
    return {"weight": codes, "weight_scale": s if scales > 1 else s[0]}, codes.double() * s.double()


def _blocks(chance: Any, n: int, k: int, rows: int, columns: int) -> tuple[dict[str, Any], torch.Tensor]:
    codes = torch.tensor(chance.standard_normal((n, k)) * 40).to(torch.float8_e4m3fn)
    s = torch.tensor(0.002 * (0.5 + chance.random((-(-n // rows), k // columns))), dtype=torch.float32)
    each = s.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)
    return {"weight": codes, "weight_scale_inv": s}, codes.double() * each.double()


def words(values: Any, bits: int, dimension: int) -> torch.Tensor:
    """Neighbours along a dimension in one int32, the first in the lowest bits."""
    per = 32 // bits
    values = np.moveaxis(values, dimension, -1).astype(np.uint64)
    found = np.zeros((*values.shape[:-1], values.shape[-1] // per), np.uint64)
    for place in range(per):
        found |= values[..., place::per] << np.uint64(bits * place)
    return torch.tensor(np.moveaxis(found.astype(np.uint32).view(np.int32), -1, dimension).copy())
