"""Matrix products of up to 32 tokens as OpenAI-Triton kernels: memory's speed is their limit.

Each program streams some rows of the weights, which are read once, past inputs that stay in the caches. They know
neither the rule that shapes them nor what the product is for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from backend.compute.dense.gate import activated


@triton.jit
def vector_kernel(
    result, x, weight, bias, residual, gain, eps, outputs,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One token: products are kept apart by column and added up once, after the last."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    weights = weight + clamped(row, outputs)[:, None] * WIDTH + columns[None, :]
    gated_weights = weight + (clamped(row, outputs) + outputs)[:, None] * WIDTH + columns[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    gate_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in tl.range(0, WIDTH, COLUMNS, num_stages=STAGES):
        inside = columns < WIDTH - start
        w = streamed(weights + start, inside[None, :], WIDTH % COLUMNS == 0).to(tl.float32)
        if ACTIVATION != "":
            gated_w = streamed(gated_weights + start, inside[None, :], WIDTH % COLUMNS == 0).to(tl.float32)
        # After the weights: it changes threads by way of shared memory, and no load passes a barrier.
        part = kept(x + start + columns, inside, WIDTH % COLUMNS == 0).to(tl.float32)
        if gain is not None:
            squares += part * part
            part *= kept(gain + start + columns, inside, WIDTH % COLUMNS == 0).to(tl.float32)
        if ACTIVATION == "":
            sums += w * part[None, :]
        else:
            gate_sums += w * part[None, :]
            sums += gated_w * part[None, :]
    scale = 1.0
    if gain is not None:
        scale = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    total, gate = tl.sum(sums, 1) * scale, tl.sum(gate_sums, 1) * scale
    finish(result, total, gate, bias, residual, row, row, row < outputs, outputs, ACTIVATION)


@partial(triton.jit, do_not_specialize=["tokens"])
def matrix_kernel(
    result, all_sums, all_squares, x, weight, bias, residual, gain, eps, outputs, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Several tokens, padded to TOKENS: the weights' rows are the rows of the product, tokens its columns."""
    SHARE: tl.constexpr = (WIDTH + COLUMNS * SPLITS - 1) // (COLUMNS * SPLITS) * COLUMNS
    EVEN: tl.constexpr = WIDTH % (COLUMNS * SPLITS) == 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    live = token < tokens
    columns = tl.program_id(1) * SHARE + tl.arange(0, COLUMNS)
    weights = weight + clamped(row, outputs)[:, None] * WIDTH + columns[None, :]
    gated_weights = weight + (clamped(row, outputs) + outputs)[:, None] * WIDTH + columns[None, :]
    inputs = x + token[:, None] * WIDTH + columns[None, :]
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    gate_sums = tl.zeros([ROWS, TOKENS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for start in tl.range(0, SHARE, COLUMNS, num_stages=STAGES):
        inside = columns < WIDTH - start
        known = live[:, None] if EVEN else live[:, None] & inside[None, :]
        part = tl.load(inputs + start, mask=known, other=0.0, eviction_policy="evict_last")
        if gain is not None:
            exact = part.to(tl.float32)
            squares += tl.sum(exact * exact, 1)
            part = (exact * kept(gain + start + columns, inside, EVEN).to(tl.float32)[None, :]).to(part.dtype)
        part = tl.trans(part)
        w = streamed(weights + start, inside[None, :], EVEN)
        if ACTIVATION == "":
            sums = tl.dot(w, part, sums, input_precision=PRECISION)
        else:
            gate_sums = tl.dot(w, part, gate_sums, input_precision=PRECISION)
            w = streamed(gated_weights + start, inside[None, :], EVEN)
            sums = tl.dot(w, part, sums, input_precision=PRECISION)
    mask = (row < outputs)[:, None] & live[None, :]
    if SPLITS > 1:
        if gain is not None and tl.program_id(0) == 0:
            tl.store(all_squares + tl.program_id(1) * tokens + token, squares, mask=live)
        line = tl.program_id(1) * tokens + token[None, :]
        if ACTIVATION == "":
            tl.store(all_sums + line * outputs + row[:, None], sums, mask=mask)
        else:
            tl.store(all_sums + line * 2 * outputs + row[:, None], gate_sums, mask=mask)
            tl.store(all_sums + (line * 2 + 1) * outputs + row[:, None], sums, mask=mask)
    else:
        if gain is not None:
            scale = tl.rsqrt(squares / WIDTH + eps)[None, :]
            sums *= scale
            gate_sums *= scale
        where = token[None, :] * outputs + row[:, None]
        finish(result, sums, gate_sums, bias, residual, where, row[:, None], mask, outputs, ACTIVATION)


@triton.jit
def join_kernel(
    result, all_sums, all_squares, bias, residual, eps, outputs,
    WIDTH: tl.constexpr, SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the splits' sums, always in the same order, and does to them what a single program would."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < outputs
    sums = tl.zeros([BLOCK], tl.float32)
    gate_sums = tl.zeros([BLOCK], tl.float32)
    total = 0.0
    for split in tl.static_range(SPLITS):
        line = split * tl.num_programs(1) + tl.program_id(1)
        if ACTIVATION == "":
            sums += tl.load(all_sums + line * outputs + row, mask=mask, other=0.0)
        else:
            gate_sums += tl.load(all_sums + line * 2 * outputs + row, mask=mask, other=0.0)
            sums += tl.load(all_sums + (line * 2 + 1) * outputs + row, mask=mask, other=0.0)
        if all_squares is not None:
            total += tl.load(all_squares + line)
    if all_squares is not None:
        scale = tl.rsqrt(total / WIDTH + eps)
        sums *= scale
        gate_sums *= scale
    where = tl.program_id(1) * outputs + row
    finish(result, sums, gate_sums, bias, residual, where, row, mask, outputs, ACTIVATION)


@triton.jit
def finish(result, sums, gate_sums, bias, residual, where, row, mask, outputs, ACTIVATION: tl.constexpr):
    """Bias, gate and residual on exact sums, and the only rounding."""
    if bias is not None and ACTIVATION != "":
        gate_sums += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
        sums += tl.load(bias + outputs + row, mask=row < outputs, other=0.0).to(tl.float32)
    elif bias is not None:
        sums += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        sums *= activated(gate_sums, ACTIVATION)
    if residual is not None:
        sums += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + where, sums.to(result.dtype.element_ty), mask=mask)


@triton.jit
def clamped(row, outputs):
    """Rows past the last read the last one again, which needs no mask; int64, since vocabularies times widths are."""
    return tl.minimum(row, outputs - 1).to(tl.int64)


@triton.jit
def streamed(at, inside, EVEN: tl.constexpr):
    """Read once in a step: they need not stay in the caches."""
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def kept(at, inside, EVEN: tl.constexpr):
    """Inputs, which every program reads."""
    if EVEN:
        return tl.load(at, eviction_policy="evict_last")
    else:
        return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_last")
