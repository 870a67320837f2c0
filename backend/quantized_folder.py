"""Checkpoints whose weights are quantized already: their tensors as the layers they make.

It knows neither torch nor what the codes mean: compute/quantized/checkpoints reads them. A layer counts as quantized by
the tensors that are there, so modules that a checkpoint leaves as they are (`ignore`, `modules_to_not_convert`) need no
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from backend.quantized_form import Form, check, form_of

if TYPE_CHECKING:
    from backend.model_folder import Tensor

SCALES = ("F16", "BF16", "F32")
BYTES = {"int8": "I8", "fp8": "F8_E4M3"}
"""Types of codes that are not packed into int32."""
UNREAD = ("input_scale", "input_zero_point", "activation_scale")
"""Endings of what only rounded activations need."""


@dataclass(frozen=True)
class Layout:
    """A quantized layer's tensors by their endings, and how its codes lie."""

    codes: str
    scales: str
    zeros: str = ""
    groups: str = ""
    """Which group each column is in."""
    shape: str = ""
    """The full weight's."""
    transposed: bool = False
    """Whether columns come before rows; zero points are then always there."""
    packed: int | None = None
    """The dimension along which codes share an int32; None: each has a byte."""

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.codes, self.scales, self.zeros, self.groups, self.shape)))

    @property
    def mark(self) -> str:
        """The tensor that only quantized layers have."""
        return self.scales if self.codes == "weight" else self.codes


_GPTQ = Layout("qweight", "scales", "qzeros", "g_idx", transposed=True, packed=0)
LAYOUTS = {
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "awq": Layout("qweight", "scales", "qzeros", transposed=True, packed=1),
    "packed": Layout("weight_packed", "weight_scale", "weight_zero_point", shape="weight_shape", packed=1),
    "plain": Layout("weight", "weight_scale", "weight_zero_point"),
    "blocks": Layout("weight", "weight_scale_inv"),
}


def layers(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with each quantized layer as one, called and shaped like the full weight it stands for.

    LoadError names a layer whose tensors do not fit together.
    """
    form = form_of(config)
    if form is None:
        return tensors
    mark = "." + LAYOUTS[form.layout].mark
    owners = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
    check(bool(owners), f"{form.layout}: the checkpoint holds no quantized layer (no tensor ends in {mark})")
    made = {f"{owner}.weight": _layer(owner, form, tensors) for owner in owners}
    taken = {part.name for layer in made.values() for part in layer.parts}
    unread = {f"{owner}.{ending}" for owner in owners for ending in UNREAD}
    return {name: tensor for name, tensor in tensors.items() if name not in taken | unread} | made


def _layer(owner: str, form: Form, tensors: dict[str, Tensor]) -> Tensor:
    layout = LAYOUTS[form.layout]
    parts = {role: tensors[name] for role in layout.roles if (name := f"{owner}.{role}") in tensors}
    _check_there(owner, form, parts)
    codes, scales = parts[layout.codes], parts[layout.scales]
    kind = BYTES[form.kind] if layout.packed is None else "I32"
    check(codes.dtype == kind, f"{owner}: codes are {codes.dtype}, not {kind}")
    check(scales.dtype in SCALES, f"{owner}: scales of type {scales.dtype} are not served")
    shape = _full_shape(form, codes.shape)
    _check_shapes(owner, form, shape, parts)
    return replace(
        codes, name=f"{owner}.weight", dtype=scales.dtype, shape=shape, form=form, parts=tuple(parts.values())
    )


def _check_there(owner: str, form: Form, parts: Mapping[str, Tensor]) -> None:
    layout = LAYOUTS[form.layout]
    codes = parts.get(layout.codes)
    check(codes is not None and len(codes.shape) == 2, f"{owner}: {layout.codes} is missing, or no matrix")
    check(layout.scales in parts, f"{owner}: {layout.scales} is missing")
    needed = layout.transposed or not form.symmetric
    check(layout.zeros in parts or not needed, f"{owner}: {layout.zeros} is missing")


def _full_shape(form: Form, codes: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the weight."""
    layout, sides = LAYOUTS[form.layout], list(codes)
    if layout.packed is not None:
        sides[layout.packed] *= 32 // form.bits
    rows, columns = reversed(sides) if layout.transposed else sides
    return rows, columns


def _check_shapes(owner: str, form: Form, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> None:
    layout, (outputs, width) = LAYOUTS[form.layout], shape
    group = form.group or width
    check(bool(width) and width % group == 0, f"{owner}: groups of {group} columns do not divide {width} (group_size)")
    scales = (-(-outputs // (form.rows or max(outputs, 1))), width // group)
    zeros = scales if layout.packed is None else (-(-outputs * form.bits // 32), width // group)
    turn = -1 if layout.transposed else 1
    for role, want in ((layout.scales, scales[::turn]), (layout.zeros, zeros[::turn]), (layout.groups, (width,))):
        found = parts[role].shape if role in parts else want
        brief = want == scales and found in _briefer(scales)
        stated = f"{list(found)}, not {list(want)}"
        check(found == want or brief, f"{owner}.{role} is {stated}, as quantization_config has it")


def _briefer(shape: tuple[int, int]) -> list[tuple[int, ...]]:
    """The same without its last ones, as scales of whole rows and of whole tensors are also stored."""
    return [shape[:at] for at in (0, 1) if set(shape[at:]) == {1}]
