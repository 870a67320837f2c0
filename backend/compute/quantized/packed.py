"""Packed: a weight of codes, scales and offsets, made of a full one and back by plain torch; not how it is multiplied.

Group-wise rounding to nearest, as in Dettmers et al. 2022 (LLM.int8()) and Yao et al. 2022 (ZeroQuant). The asymmetric
integer form is DeepSpeed's (deepspeed.inference.quantization), bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backend.errors import LoadError

BITS = {"int4": 4, "int8": 8, "fp8": 8}
FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max
LEAST = 1e-12
"""Scales' least size: of a group of zeros."""
AT_ONCE = 1 << 22
"""Elements that are rounded at a time: what that takes beside the weight is some float32 copies of them."""

SHARES = {
    "int4": (0.8, 0.85, 0.9, 0.95, 1.0, 1.05),
    "int8": (1.0,),
    "fp8": tuple(2 ** (eighth / 8) for eighth in range(8)),
}
"""Of the scale with which the largest code stands for a group's value of largest size: those that are tried."""

Agree = Callable[[Tensor, str], Tensor]
"""What a rank has to the "max" or the "sum" of it over all ranks that share the rows."""


@dataclass(frozen=True)
class Scheme:
    """How weights are packed."""

    kind: str
    """A key of BITS; fp8 is float8_e4m3fn."""
    group: int
    """Columns of a row that share a scale; 0: all of them."""
    symmetric: bool = True
    stored: bool = False
    """Whether a checkpoint holds the codes: offsets are then in float32 and added to q * scale."""
    ordered: bool = False
    """Whether groups are of columns in an order of their own, not of neighbours."""

    @property
    def bits(self) -> int:
        return BITS[self.kind]

    def columns(self, width: int) -> int:
        """Columns of each group of a weight of so many; LoadError where they do not divide it."""
        size = self.group or width
        if width % size:
            raise LoadError(f"quantization groups of {size} columns do not divide {width}; set quantization_group")
        return size


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [N, K]. Tensors are the places that loading fills, so two may be views of one, row by row.

    A code q of column k means q * scale + offset of k's group; without an offset (q - 2 ** (bits - 1)) * scale, and for
    fp8 q * scale. With `divides` it is q / scale + offset: DeepSpeed's form.
    """

    scheme: Scheme
    codes: Tensor
    """uint8 [N, K] of int8; uint8 [N, K / 2] of int4, the even column in the high half; float8 [N, K] of fp8."""
    scale: Tensor
    """[N, groups]"""
    offset: Tensor | None
    """[N, groups]; None: symmetric"""
    dtype: torch.dtype
    """Of the full weight."""
    divides: bool = False
    agree: Agree | None = None
    """Where the columns are split among ranks and a row has one scale: so that it is the same on all of them."""
    order: Tensor | None = None
    """int64 [K]: which column of the weight the codes have in each place; None: they lie as it does."""

    @classmethod
    def empty(cls, scheme: Scheme, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Packed:
        """Places for a weight [rows, width], to be filled."""
        groups = width // scheme.columns(width)
        stored = width // 2 if scheme.bits == 4 else width
        codes = torch.empty(rows, stored, dtype=FP8 if scheme.kind == "fp8" else torch.uint8, device=device)
        asymmetric = not scheme.symmetric
        divides = asymmetric and not scheme.stored
        scale = torch.empty(rows, groups, dtype=dtype if divides else torch.float32, device=device)
        order = torch.empty(width, dtype=torch.int64, device=device) if scheme.ordered else None
        return cls(scheme, codes, scale, torch.empty_like(scale) if asymmetric else None, dtype, divides, order=order)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the full weight."""
        rows, stored = self.codes.shape
        return rows, stored * 2 if self.scheme.bits == 4 else stored

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> list[Tensor]:
        """All that it has of them."""
        return [each for each in (self.codes, self.scale, self.offset, self.order) if each is not None]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.tensors)

    def rows(self, start: int, stop: int) -> Packed:
        """A view of some rows."""
        offset = None if self.offset is None else self.offset[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], offset=offset)

    def chosen(self, rows: Tensor) -> Packed:
        """A copy of these rows, int64 [n]."""
        offset = None if self.offset is None else self.offset[rows]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], offset=offset)

    def agreed(self, agree: Agree) -> Packed:
        """The same places, of which other ranks hold the rest of each row."""
        return replace(self, agree=agree)

    def slices(self, elements: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about so many elements each."""
        rows, width = self.shape
        step = max(1, elements // width)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def fill(self, full: Tensor) -> None:
        """Round a full weight [N, K] into this one's places. It is computed in the full weight's own precision."""
        if tuple(full.shape) != self.shape:
            raise LoadError(f"a weight {list(full.shape)} does not fit {list(self.shape)}")
        full = full.to("cuda" if torch.cuda.is_initialized() else self.device)  # for places in host memory too: offload
        scale = None if self.agree is None else self._agreed_scale(full, self.agree)
        for start, stop in self.slices(AT_ONCE):
            part = full[start:stop].to(self.dtype)
            self.rows(start, stop).take(pack(part, self.scheme, None if scale is None else scale[start:stop]))

    def _agreed_scale(self, full: Tensor, agree: Agree) -> Tensor:
        """[N, 1], the one that all ranks' columns together would get."""
        ends = agree(_ends(full[:, None].to(self.dtype), self.scheme), "max")
        slices = [slice(*each) for each in self.slices(AT_ONCE)]
        errors = [_errors(full[each, None].to(self.dtype), ends[each], self.scheme) for each in slices]
        return _best(ends, agree(torch.cat(errors, dim=1), "sum"), self.scheme)

    def take(self, other: Packed) -> None:
        """Copy another one's tensors into these places; LoadError unless it has the same form."""
        if (self.shape, self.scheme, self.divides) != (other.shape, other.scheme, other.divides):
            raise LoadError(f"a weight {other.shape} of {other.scheme} does not fit {self.shape} of {self.scheme}")
        self.codes.copy_(other.codes)
        self.scale.copy_(other.scale)
        if self.offset is not None and other.offset is not None:
            self.offset.copy_(other.offset)
        if self.order is not None and other.order is not None:
            self.order.copy_(other.order)

    @property
    def by_row(self) -> bool:
        """Whether it is fp8 with one scale a row, which GPUs can multiply with fp8 activations."""
        return self.scheme.kind == "fp8" and self.scale.shape[1] == 1

    def full(self) -> Tensor:
        """The weight [N, K] in its dtype."""
        codes = self._codes()
        if self.divides and self.offset is not None:  # every step rounded to dtype, as DeepSpeed's own
            grouped = codes.to(self.dtype).div_(self.scale[..., None]).add_(self.offset[..., None])
        else:
            grouped = codes.float().mul_(self.scale.float()[..., None])  # never in the codes themselves
            grouped = grouped if self.offset is None else grouped.add_(self.offset.float()[..., None])
        found = grouped.flatten(1).to(self.dtype)
        return found if self.order is None else torch.empty_like(found).index_copy_(1, self.order, found)

    def arranged(self, x: Tensor) -> tuple[Tensor, Packed]:
        """Inputs [..., K] in the order of the codes, and the weight that is to be multiplied with those."""
        return (x, self) if self.order is None else (x.index_select(-1, self.order), replace(self, order=None))

    def _codes(self) -> Tensor:
        """[N, groups, columns], centred if there is no offset."""
        codes = unpaired(self.codes) if self.scheme.bits == 4 else self.codes
        if self.scheme.kind == "fp8":
            codes = widened(codes)
        elif self.offset is None:
            codes = codes.float().sub_(1 << self.scheme.bits - 1)
        return codes.reshape(len(codes), self.scale.shape[1], -1)


def joined(parts: Sequence[Packed]) -> Packed:
    """Empty places for the rows of all parts, which have one form."""
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)

    def more(like: Tensor) -> Tensor:
        return like.new_empty(rows, like.shape[1])

    offset = None if first.offset is None else more(first.offset)
    return replace(first, codes=more(first.codes), scale=more(first.scale), offset=offset)


def unpaired(codes: Tensor) -> Tensor:
    """uint8 [N, K / 2] of two codes a byte -> uint8 [N, K]"""
    wide = codes.to(torch.int16)
    return (wide >> 4 | (wide & 15) << 8).view(torch.uint8)  # the lower byte comes first


def widened(codes: Tensor) -> Tensor:
    """float8 to float32 by its bits: torch's own conversion on CPU is some ten times slower. No NaN."""
    bits = codes.view(torch.uint8).to(torch.int16)
    half = ((bits & 127) << 7 | bits << 8 & -(1 << 15)).view(torch.float16)  # exponents of 2 ** 8 less
    return half.float() * 256


def pack(full: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Packed:
    """The weight [N, K] rounded, on its own device; with this scale [N, groups], or the best of some."""
    grouped = full.unflatten(1, (-1, scheme.columns(full.shape[1])))  # [N, groups, columns]
    offset = None
    if scheme.symmetric:
        scale = searched(grouped, scheme) if scale is None else scale
        codes = _rounded(grouped.float(), scale, scheme)
        codes = codes.to(FP8) if scheme.kind == "fp8" else (codes + (1 << scheme.bits - 1)).to(torch.uint8)
    else:
        codes, scale, offset = _asymmetric(grouped, scheme.bits)
    codes = codes.flatten(1)
    if scheme.bits == 4:
        codes = codes[:, 0::2] << 4 | codes[:, 1::2]
    return Packed(scheme, codes, scale, offset, full.dtype, divides=not scheme.symmetric)


def searched(grouped: Tensor, scheme: Scheme) -> Tensor:
    """[N, groups, columns] -> [N, groups]: of some scales the one with the least squared error."""
    ends = _ends(grouped, scheme)
    return ends if len(SHARES[scheme.kind]) == 1 else _best(ends, _errors(grouped, ends, scheme), scheme)


def _ends(grouped: Tensor, scheme: Scheme) -> Tensor:
    """[N, groups]: the scales with which the largest code stands for the value of largest size.

    For int4 it is the lowest code, whatever that value's sign, so that all codes are used: scales may be negative.
    """
    low, high = (each.float() for each in grouped.aminmax(dim=-1))
    if scheme.kind == "int4":
        return _not_zero(torch.where(-low > high, low, high) / -8)
    return _not_zero(torch.maximum(-low, high) / (MOST if scheme.kind == "fp8" else 127))


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < LEAST, LEAST, scale)


def _rounded(grouped: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """float32 [N, groups, columns] as codes, centred, in float32."""
    codes = grouped / scale[..., None]
    if scheme.kind == "fp8":
        return widened(codes.clamp_(-MOST, MOST).to(FP8))
    half = 1 << scheme.bits - 1
    return codes.round_().clamp_(-half, half - 1)


def _errors(grouped: Tensor, ends: Tensor, scheme: Scheme) -> Tensor:
    """Squared errors, float64 [shares, N, groups]; in that precision sums do not depend on who has which columns."""
    grouped, found = grouped.float(), []
    for share in SHARES[scheme.kind]:
        scale = ends * share
        error = _rounded(grouped, scale, scheme).mul_(scale[..., None]).sub_(grouped)
        found.append(error.square_().sum(-1, dtype=torch.float64))
    return torch.stack(found)


def _best(ends: Tensor, errors: Tensor, scheme: Scheme) -> Tensor:
    return ends * torch.tensor(SHARES[scheme.kind], device=ends.device)[errors.argmin(0)]


def _asymmetric(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """In the weight's dtype throughout, as DeepSpeed; but for a group of equal values, which it makes NaN."""
    largest = (1 << bits) - 1
    offset, top = grouped.amin(-1), grouped.amax(-1)
    scale = largest / (top - offset)
    scale = torch.where(scale.isfinite(), scale, 1.0)
    codes: Tensor = ((grouped - offset[..., None]) * scale[..., None]).clamp_(0, largest).round_()
    return codes.to(torch.uint8), scale, offset
