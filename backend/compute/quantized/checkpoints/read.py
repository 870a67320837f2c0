"""A quantized layer of a checkpoint, or a rank's part of it, as Packed; not how its tensors are found or multiplied.

No number is rounded: a code q with the zero point z and the scale s means (q - z) * s, which q * s - z * s gives
exactly in float32 for scales of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backend.compute.quantized.checkpoints.words import in_columns, in_rows, numbers, paired
from backend.compute.quantized.packed import FP8, Packed, Scheme, unpaired
from backend.errors import LoadError
from backend.model_folder import Tensor as Stored
from backend.quantized_form import Form

Open = Callable[[str], Any]
"""A tensor's name -> its slice, of which no more is read than is asked for."""
ONES = {4: 0x11111111, 8: 0x01010101}
Codes = tuple[Tensor, Tensor, Tensor | None]
"""Codes as Packed has them; float32 scales [N, groups]; zero points of the same shape."""


def scheme_of(form: Form) -> Scheme:
    return Scheme(form.kind, form.group, form.symmetric, stored=True, ordered=form.ordered)


def read(tensor: Stored, rows: slice, columns: slice, opened: Open) -> Packed:
    """These rows and columns. LoadError names the layer where they cannot be had without the rest."""
    form, owner = tensor.form, tensor.name.removesuffix(".weight")
    assert form is not None
    parts = {part.name.removeprefix(f"{owner}."): opened(part.name) for part in tensor.parts}
    step = form.group or (8 if form.layout != "plain" else 1)
    whole = (columns.start, columns.stop) == (0, tensor.shape[1])
    if not whole and (columns.start % step or columns.stop % step):
        raise LoadError(
            f"{owner}: this rank has columns {columns.start} to {columns.stop}, which cut {step} that belong together"
        )
    codes, scale, zero = LAYOUTS[form.layout](owner, form, parts, rows, columns)
    if not bool(scale.isfinite().all()) or (codes.dtype == FP8 and bool((codes.view(torch.uint8) & 127 == 127).any())):
        raise LoadError(f"{owner} holds values that are no numbers")
    order = _order(owner, form, parts)
    if order is not None:
        codes = paired(unpaired(codes)[:, order]) if form.bits == 4 else codes[:, order]
    offset = None if form.symmetric or zero is None else -(zero * scale)
    return Packed(scheme_of(form), codes.contiguous(), scale.contiguous(), offset, torch.float32, order=order)


def _groups(form: Form, columns: slice) -> slice:
    return slice(columns.start // form.group, columns.stop // form.group) if form.group else slice(None)


def _gptq(owner: str, form: Form, parts: dict[str, Any], rows: slice, columns: slice) -> Codes:
    """Codes in int32 down the columns; zero points along the rows, one less than they are unless it is version 2.

    The one is put back in whole words, as it was taken: a zero point of 0 had borrowed from the next.
    """
    per, groups = 32 // form.bits, _groups(form, columns)
    codes = in_columns(parts["qweight"][columns.start // per : columns.stop // per, rows], form.bits)
    scale = parts["scales"][groups, rows].float().t()
    words = parts["qzeros"][groups, :] + (ONES[form.bits] if form.layout == "gptq" else 0)
    zero = numbers(words, form.bits)[:, rows].t()
    if form.symmetric and bool((zero != 1 << form.bits - 1).any()):
        raise LoadError(f"{owner}.qzeros are not all {1 << form.bits - 1}, though quantization_config says sym")
    return codes, scale, zero.float()


def _order(owner: str, form: Form, parts: dict[str, Any]) -> Tensor | None:
    """The columns by their groups, where these are scattered (desc_act)."""
    if "g_idx" not in parts:
        return None
    group_of: Tensor = parts["g_idx"][:]
    neighbours = torch.arange(len(group_of), dtype=group_of.dtype) // (form.group or len(group_of))
    if torch.equal(group_of, neighbours) and not form.ordered:
        return None
    order = group_of.argsort(stable=True)
    if not form.ordered or not torch.equal(group_of[order], neighbours):
        raise LoadError(f"{owner}.g_idx does not put columns into groups as quantization_config has it (desc_act)")
    return order


def _awq(owner: str, form: Form, parts: dict[str, Any], rows: slice, columns: slice) -> Codes:
    """Codes and zero points in int32 along the rows, in AWQ's order."""
    groups, low = _groups(form, columns), rows.start // 8
    words, inside = slice(low, -(-rows.stop // 8)), slice(rows.start - low * 8, rows.stop - low * 8)
    codes = numbers(parts["qweight"][columns, words], 4, interleaved=True)[:, inside].t()
    zero = numbers(parts["qzeros"][groups, words], 4, interleaved=True)[:, inside].t()
    return paired(codes), parts["scales"][groups, rows].float().t(), zero.float()


def _packed(owner: str, form: Form, parts: dict[str, Any], rows: slice, columns: slice) -> Codes:
    """compressed-tensors: codes in int32 along the columns, zero points down the rows."""
    per, groups = 32 // form.bits, _groups(form, columns)
    words = parts["weight_packed"]
    width = words.get_shape()[1] * per
    if "weight_shape" in parts and (shape := parts["weight_shape"][:].tolist()) != [words.get_shape()[0], width]:
        raise LoadError(f"{owner}: {shape[1:]} columns are not served in this form; multiples of {per} are")
    codes = in_rows(words[rows, columns.start // per : columns.stop // per], form.bits)
    scale, zero = _scales(form, parts, "weight_scale", rows, groups), None
    if not form.symmetric:
        zero = numbers(parts["weight_zero_point"][:, groups].t().contiguous(), form.bits).t()[rows].float()
    return codes, scale, zero


def _plain(owner: str, form: Form, parts: dict[str, Any], rows: slice, columns: slice) -> Codes:
    """A code in a byte, int8 or float8; the scales of blocks are given to each of their rows."""
    groups, codes = _groups(form, columns), parts["weight"][rows, columns]
    scale = _scales(form, parts, "weight_scale" if form.layout == "plain" else "weight_scale_inv", rows, groups)
    if form.kind == "fp8":
        return codes, scale, None
    zero = None
    if "weight_zero_point" in parts:
        zero = _scales(form, parts, "weight_zero_point", rows, groups)
        if form.symmetric and bool(zero.any()):
            raise LoadError(f"{owner}.weight_zero_point is not 0, though quantization_config says symmetric")
        zero = zero + 128
    return codes.view(torch.uint8) ^ 128, scale, zero


def _scales(form: Form, parts: dict[str, Any], role: str, rows: slice, groups: slice) -> Tensor:
    """float32 [rows, groups] of what has a row for each `form.rows`."""
    found: Tensor = parts[role][...].float()
    found = found.reshape(-1, 1) if found.dim() < 2 else found
    count = rows.stop - rows.start
    if form.rows == 1:
        return found[rows, groups]
    each = torch.arange(rows.start, rows.stop) // form.rows if form.rows else torch.zeros(count, dtype=torch.int64)
    return found[each][:, groups]


LAYOUTS: dict[str, Callable[[str, Form, dict[str, Any], slice, slice], Codes]] = {
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    "packed": _packed,
    "plain": _plain,
    "blocks": _plain,
}
