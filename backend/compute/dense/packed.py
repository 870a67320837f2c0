"""Products with packed weights on CUDA: which way for how many tokens, and the launches.

One token: packed_vector.py. Up to packed_shape.TILED: packed_matrix.py, or packed_warpgroup.py where a Hopper GPU has
some tokens in bfloat16. More: weights made full, a part at a time, for the library's product. From packed_shape.SCALED
on, fp8 weights of one scale a row: torch's scaled product, the only way that rounds activations, to fp8 with a scale
for each token: done to prompts, and where many sequences decode together. Launches depend on shapes alone and read
nothing back: CUDA graphs may hold them.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from backend.compute.dense.base import Norm, known
from backend.compute.dense.gate import gated
from backend.compute.dense.norm import normed
from backend.compute.dense.packed_codes import LEVELS
from backend.compute.dense.packed_full import rounded, unpacked
from backend.compute.dense.packed_matrix import arranged_kernel, packed_matrix_kernel
from backend.compute.dense.packed_shape import ROOM, SCALED, TILED, matrix, taken, vector, warpgroup
from backend.compute.dense.packed_vector import packed_vector_kernel
from backend.compute.dense.shape import Shape
from backend.compute.dense.small_kernels import join_kernel
from backend.compute.quantized.packed import Packed, Scheme, pack
from backend.errors import one_line

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from backend.compute.dense.packed_warpgroup import in_shared_memory, packed_warpgroup_kernel
except ImportError:  # OpenAI Triton is of another time
    packed_warpgroup_kernel = None
log = logging.getLogger("tritonspeed")
SCRATCH = 128 << 20
"""Bytes of a weight that are made full at a time."""
INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in OpenAI Triton's interpreter, which knows no PTX."""
FP8_FROM = (8, 9)
"""The compute capability that multiplies fp8, and for which OpenAI Triton has it at all."""


def product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """[T, K] by [N, K] -> [T, N]"""
    return linear(x, weight, bias, None, None, None)


def linear(
    x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None, norm: Norm | None, activation: str | None
) -> Tensor:
    """See base.Ops; of any number of tokens."""
    if weight.order is not None:
        x, norm = (x if norm is None else normed(x.contiguous(), None, *norm)), None
        x, weight = weight.arranged(x)
    outputs, width = weight.shape
    group, per = weight.scheme.columns(width), 8 // weight.scheme.bits
    x = x.contiguous()
    few = len(x) <= TILED and taken(group, width, per) and not scales(x, weight)
    if len(x) == 1 and few and _readable(weight):
        shape = vector(outputs if activation is None else outputs // 2, width, activation is not None, per)
        return by_vector(shape, x, weight, bias, residual, norm, activation)
    if few:
        found = several(x, weight, bias, residual if activation is None else None, norm)
    else:
        found = many(x if norm is None else normed(x, None, *norm), weight, bias)
    if activation is not None:
        found = gated(found, activation)
    return found if residual is None or found is residual else residual.add_(found)


def by_vector(
    shape: Shape,
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    activation: str | None,
) -> Tensor:
    """One token, in programs of this shape."""
    _check(x, weight)
    outputs, width = weight.shape
    outputs = outputs if activation is None else outputs // 2
    result = _place(x, outputs, residual)
    gain, eps = norm or (None, 0.0)
    packed_vector_kernel[(triton.cdiv(outputs, shape.rows),)](
        result, x, weight.codes.view(torch.int32), weight.scale, weight.offset, bias, residual, gain, eps, outputs,
        WIDTH=width, GROUP=weight.scheme.columns(width), ROWS=shape.rows, WORDS=shape.columns, STAGES=shape.stages,
        LEVELS=LEVELS[weight.scheme.kind], DIVIDES=weight.divides, ROUGH=not INTERPRETED,
        ACTIVATION="" if activation is None else known(activation), num_warps=shape.warps,
    )  # fmt: skip
    return result


def several(x: Tensor, weight: Packed, bias: Tensor | None, residual: Tensor | None, norm: Norm | None) -> Tensor:
    """Up to TILED tokens."""
    outputs, width = weight.shape
    per = 8 // weight.scheme.bits
    cut = warpgroup(len(x), outputs, width, per)
    if cut and x.dtype is torch.bfloat16 and warpgroups_multiply(x.device):
        return by_matrix(*cut, x, weight, bias, residual, norm, warpgroups=True)
    cut = matrix(len(x), outputs, width, weight.scheme.columns(width), per, x.itemsize, _room(x.device))
    return by_matrix(*cut, x, weight, bias, residual, norm)


def by_matrix(
    shape: Shape,
    size: int,
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None = None,
    warpgroups: bool = False,
) -> Tensor:
    """Several tokens, in programs of this shape for `size` tokens each.

    `warpgroups`: by a Hopper GPU's, of bfloat16; the shape's columns then divide the width.
    """
    _check(x, weight)
    (outputs, width), tokens = weight.shape, len(x)
    group, per = weight.scheme.columns(width), 16 // weight.scheme.bits
    result = _place(x, outputs, residual)
    sums = None
    if shape.splits > 1:
        sums = torch.empty(shape.splits, tokens, outputs, dtype=torch.float32, device=x.device)
    arranged = _arranged(x, per, shape.columns if warpgroups else width, norm)
    codes = weight.codes.view(torch.int16)
    grid = (triton.cdiv(outputs, shape.rows), shape.splits, triton.cdiv(tokens, size))
    others = (weight.scale, weight.offset, bias, residual, outputs, tokens)
    constants = {
        "ROWS": shape.rows, "COLUMNS": shape.columns, "TOKENS": size, "STAGES": shape.stages,
        "LEVELS": LEVELS[weight.scheme.kind], "DIVIDES": weight.divides, "num_warps": shape.warps,
    }  # fmt: skip
    if warpgroups:
        packed_warpgroup_kernel[grid](
            result, sums, _tiled(arranged, size, shape.columns), _tiled(codes, shape.rows, shape.columns // per),
            *others, width // shape.columns, width // group, shape.splits,
            GROUP=0 if group == width else group, **constants,
        )  # fmt: skip
    else:
        packed_matrix_kernel[grid](
            result, sums, arranged, codes, *others, WIDTH=width, GROUP=group, SPLITS=shape.splits,
            PAIRED=x.dtype == torch.bfloat16 and not INTERPRETED,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32", **constants,
        )  # fmt: skip
    if sums is not None:
        join_kernel[(triton.cdiv(outputs, 512), tokens)](
            result, sums, None, bias, residual, 0.0, outputs,
            WIDTH=width, SPLITS=shape.splits, ACTIVATION="", BLOCK=512,
        )  # fmt: skip
    return result


def _tiled(matrix: Tensor, rows: int, columns: int) -> Any:
    """What TMA must know of it, to copy so many rows and columns at a time."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns], in_shared_memory(columns))


@lru_cache
def warpgroups_multiply(device: torch.device) -> bool:
    """Whether a Hopper GPU is there, and a Gluon that understands the kernel."""
    if packed_warpgroup_kernel is None or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    weight = pack(torch.ones(64, 256, dtype=torch.bfloat16, device=device), Scheme("int8", 64))
    try:
        by_matrix(Shape(64, 128, 4, 2, 1), 64, weight.full(), weight, None, None, warpgroups=True)
    except Exception as error:
        log.warning("products with packed weights without warp groups: %s", one_line(error))
        return False
    return True


def _check(x: Tensor, weight: Packed) -> None:
    """Kernels read memory as it lies."""
    assert all(each.is_contiguous() for each in (x, *weight.tensors)) and x.shape[1] == weight.shape[1]


def _place(x: Tensor, outputs: int, residual: Tensor | None) -> Tensor:
    result = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device) if residual is None else residual
    assert result.is_contiguous() and result.shape == (len(x), outputs)
    return result


def _arranged(x: Tensor, per: int, span: int, norm: Norm | None) -> Tensor:
    """Of every `span` columns of a token 0, per, 2 * per and so on, then 1, per + 1 and so on; after a norm."""
    tokens, width = x.shape
    arranged = torch.empty_like(x)
    gain, eps = norm or (None, 0.0)
    block = 1024 if norm is None else triton.next_power_of_2(width)
    arranged_kernel[(tokens, triton.cdiv(width, block))](
        arranged, x, gain, eps, WIDTH=width, SPAN=span, PER=per, BLOCK=block, num_warps=max(4, min(16, block // 512))
    )
    return arranged


def many(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """As many tokens as a prompt has."""
    if scales(x, weight):
        return scaled(x, weight, bias)
    outputs, width = weight.shape
    rows = max(1, SCRATCH // (width * x.dtype.itemsize))
    if outputs <= rows:
        return F.linear(x, _full(weight, x.dtype), bias)
    result = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    for start in range(0, outputs, rows):
        stop = min(start + rows, outputs)
        torch.mm(x, _full(weight.rows(start, stop), x.dtype).t(), out=result[:, start:stop])
    return result if bias is None else result.add_(bias)


def _full(weight: Packed, dtype: torch.dtype) -> Tensor:
    """In the scratch: until the next one."""
    outputs, width = weight.shape
    room = _scratch(weight.device, max(SCRATCH, width * dtype.itemsize))
    place = room.view(dtype)[: outputs * width].view(outputs, width)
    return unpacked(weight, place) if _readable(weight) else place.copy_(weight.full())


@lru_cache
def _scratch(device: torch.device, size: int) -> Tensor:
    """Kept for good: CUDA graphs may have its address."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


def scales(x: Tensor, weight: Packed) -> bool:
    """Whether it is for torch's scaled product: many tokens, one scale a row, on a GPU that multiplies fp8."""
    if len(x) < SCALED:
        return False
    fits = weight.by_row and x.dtype == torch.bfloat16 and not (weight.shape[0] % 16 or weight.shape[1] % 16)
    return fits and knows_fp8(x.device)


@lru_cache
def knows_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_FROM


def _readable(weight: Packed) -> bool:
    """Whether kernels can load its codes as numbers."""
    return weight.scheme.kind != "fp8" or knows_fp8(weight.device) or INTERPRETED


@lru_cache
def _room(device: torch.device) -> int:
    """Bytes of shared memory for a program."""
    if device.type != "cuda":
        return ROOM
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks this one
    return int(properties.shared_memory_per_block_optin)


def scaled(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Activations rounded to fp8, a scale for each token."""
    codes, scale = rounded(x)
    found = torch._scaled_mm(
        codes, weight.codes.t(), scale_a=scale, scale_b=weight.scale.float().t(), out_dtype=x.dtype, use_fast_accum=True
    )
    return found if bias is None else found.add_(bias)
