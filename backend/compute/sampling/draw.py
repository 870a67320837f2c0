"""Draws one token of each row on the GPU, as launches that depend on shapes only: a CUDA graph may hold them.

Settings are read on the device, and a row that needs a pass no more costs it nothing but an early end. Each row is
shared out among many programs, each pass's sums are joined by whoever needs them next. Rows that the fixed number of
rounds leaves undecided are finished by one program each. Greedy rows end after the first pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from backend.compute.sampling.kernels import (
    FIELDS,
    PIVOTS,
    again_kernel,
    first_kernel,
    last_kernel,
    peak_kernel,
    sum_kernel,
)
from backend.compute.sampling.parameters import WORDS


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work is cut; it changes no result."""

    span: int
    """Logits of one program."""
    block: int
    """Logits in registers at once."""
    rounds: int
    """Rounds in which all programs take part."""
    warps: int = 4
    last_block: int = 2048
    last_warps: int = 16


def shape(rows: int) -> Shape:
    """Few rows: more programs than the device has processors."""
    return Shape(1024, 512, 3) if rows <= 8 else Shape(4096, 512, 2)


def draw(logits: Tensor, parameters: Tensor, logprobs: Tensor | None = None, cut: Shape | None = None) -> Tensor:
    """Logits [S, V] of any float type, parameters int32 [S, WORDS] -> token ids int64 [S]; see sampler.BROKEN.

    Fills `logprobs`, float32 [S], with the log-probabilities of the ids under the logits as they are, if it is given.
    """
    rows, width = logits.shape
    assert logits.stride(1) == 1 and parameters.shape == (rows, WORDS) and parameters.is_contiguous()
    cut = cut or shape(rows)
    parts = triton.cdiv(width, cut.span)
    row = logits, logits.stride(0), width
    values, ids, masses, known, counts, totals = _work(rows, parts, cut.rounds, logits.device)
    left = values, ids, masses
    padded, grid = triton.next_power_of_2(parts), (rows, parts)
    sizes = {"SPAN": cut.span, "BLOCK": cut.block, "PARTS": padded, "num_warps": cut.warps}
    told = {"LOGPROBS": logprobs is not None}
    peak_kernel[grid](*row, values, ids, SPAN=cut.span, num_warps=cut.warps)
    first_kernel[grid](*row, parameters, *left, **sizes, **told)
    for step in range(cut.rounds):
        sum_kernel[grid](*row, parameters, *left, known, counts, totals, STEP=step, **sizes)
        again_kernel[grid](*row, parameters, *left, known, counts, totals, STEP=step, **sizes)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    last_kernel[(rows,)](
        *row, parameters, *left, known, parts, tokens, tokens if logprobs is None else logprobs,
        STEP=cut.rounds, BLOCK=cut.last_block, PARTS=padded, num_warps=cut.last_warps, **told,
    )  # fmt: skip
    return tokens


def _work(rows: int, parts: int, rounds: int, device: torch.device) -> tuple[Tensor, ...]:
    """The work tensors that kernels.py describes."""
    values = torch.empty(rounds + 2, rows, parts, dtype=torch.float32, device=device)
    masses = torch.empty(2, rows, parts, dtype=torch.int64, device=device)
    known = torch.empty(max(rounds, 1), rows, FIELDS.value, dtype=torch.int64, device=device)
    counts = torch.empty(rows, parts, PIVOTS.value, dtype=torch.int64, device=device)
    return values, torch.empty_like(values, dtype=torch.int32), masses, known, counts, torch.empty_like(counts)
