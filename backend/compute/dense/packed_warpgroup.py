"""Several tokens' product with packed weights by a Hopper GPU's warp groups, in Gluon, OpenAI Triton's lower level.

As in packed_matrix.py a program makes codes weights in the registers from which tensor cores take them, so that nothing
changes threads. OpenAI Triton waits behind each product of such a factor; here the codes of the next are taken apart
while it runs. Codes and inputs come by TMA, some tiles ahead. The kernel knows no rule that shapes it.

A product under way still reads its registers, which ptxas does not always keep from others: whoever changes when this
one waits, reads the machine code again (tests/backend/compute/test_packed_registers.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from backend.compute.dense.packed_codes import SCALED, shift_of, unpacking

BARRIER = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Its name until OpenAI Triton 3.6, and since."""


@gluon.constexpr_function
def in_shared_memory(columns: int) -> gl.NVMMASharedLayout:
    """A tile of 16-bit numbers, as TMA writes it and tensor cores read it."""
    return gl.NVMMASharedLayout(min(128, 2 * columns), 16, 2)


@gluon.constexpr_function
def by_group(rows: int, groups: int, words: int, warps: int) -> gl.DistributedLinearLayout:
    """[rows, groups, words of a group], each where the first factor of a product has it if it is [rows, words].

    Groups come first in a thread, so that it loads what they share at once.
    """
    each = words // groups

    def column(word: int) -> list[int]:
        return [0, 0, word] if word < each else [0, word // each, 0]

    def doubled(start: int, stop: int) -> list[int]:
        return [start << bit for bit in range((max(start, stop) // start).bit_length() - 1)]

    own = sorted([column(1), *(column(word) for word in doubled(8, words))], key=lambda basis: basis[2] > 0)
    below = [[row, 0, 0] for row in (8, *doubled(16 * warps, rows))]
    lanes = [column(2), column(4), [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        own + below, lanes, [[row, 0, 0] for row in doubled(16, 16 * warps)], [], [rows, groups, each]
    )


@gluon.jit(do_not_specialize=["tokens", "splits"])
def packed_warpgroup_kernel(
    result, all_sums, inputs, codes, scale, offset, bias, residual, outputs, tokens, tiles, groups, splits,
    GROUP: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    LEVELS: gl.constexpr, DIVIDES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The weights' rows are the rows of the product, tokens its columns.

    inputs: TMA's descriptor of x as arranged_kernel leaves it, COLUMNS at a time; codes: that of words of 16 bits.
    tiles: COLUMNS of a row, which they divide; groups: scales of a row, of which GROUP columns share one, 0: all.
    """
    PER: gl.constexpr = 4 if LEVELS == 16 else 2
    WORDS: gl.constexpr = COLUMNS // PER
    LATE: gl.constexpr = GROUP == 0 and offset is None
    GROUPS: gl.constexpr = COLUMNS // GROUP if GROUP > 0 and GROUP < COLUMNS else 1
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    SPREAD: gl.constexpr = by_group(ROWS, GROUPS, WORDS, num_warps)
    BYTES: gl.constexpr = 2 * (ROWS * WORDS + TOKENS * COLUMNS)
    first_row, first_token = gl.program_id(0) * ROWS, gl.program_id(2) * TOKENS
    begin, end = gl.program_id(1) * tiles // splits, (gl.program_id(1) + 1) * tiles // splits
    q_tiles = gl.allocate_shared_memory(gl.int16, [STAGES, ROWS, WORDS], codes.layout)
    x_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TOKENS, COLUMNS], inputs.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for early in gl.static_range(STAGES):
        mbarrier.init(arrived.index(early), count=1)
    hopper.fence_async_shared()
    for early in gl.static_range(STAGES - 1):
        _fetch(
            inputs, codes, q_tiles, x_tiles, arrived, first_row, first_token, begin + early, early, begin + early < end,
            COLUMNS, WORDS, BYTES,
        )  # fmt: skip
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SPREAD)))
    if not LATE:
        each, low = _scales(scale, offset, row, outputs, begin, groups, GROUP, COLUMNS, GROUPS, SPREAD)
    sums = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
    before = gl.zeros([ROWS, WORDS], gl.bfloat16, FACTOR)
    for tile in range(begin, end):
        stage = (tile - begin) % STAGES
        mbarrier.wait(arrived.index(stage), (tile - begin) // STAGES & 1)
        q = q_tiles.index(stage).load(FACTOR)
        if not LATE:
            step, middle = _meaning(each, low, offset, SPREAD, FACTOR, DIVIDES, LEVELS)
            following = gl.minimum(tile + 1, tiles - 1)
            each, low = _scales(scale, offset, row, outputs, following, groups, GROUP, COLUMNS, GROUPS, SPREAD)
        for place in gl.static_range(PER):
            w = gl.inline_asm_elementwise(unpacking(LEVELS, shift_of(LEVELS, place)), "=r,r", [q], gl.bfloat16, True, 2)
            if not LATE:
                w = gl.inline_asm_elementwise(SCALED, "=r,r,r,r", [w, step, middle], gl.bfloat16, True, 2)
            part = x_tiles.index(stage).slice(place * WORDS, WORDS, dim=1).permute([1, 0])
            sums = hopper.warpgroup_mma(w, part, sums, is_async=True)
            sums, before = hopper.warpgroup_mma_wait(1, deps=[sums, before])  # whose registers are free then
            before = w
            if place == 0:  # the tile before is done with
                BARRIER()
                _fetch(
                    inputs, codes, q_tiles, x_tiles, arrived, first_row, first_token, tile + STAGES - 1,
                    (stage + STAGES - 1) % STAGES, tile + STAGES - 1 < end, COLUMNS, WORDS, BYTES,
                )  # fmt: skip
    sums, before = hopper.warpgroup_mma_wait(0, deps=[sums, before])
    _end(
        result, all_sums, sums, scale, bias, residual, first_row, first_token, outputs, tokens,
        ROWS, TOKENS, LATE, DIVIDES,
    )  # fmt: skip


@gluon.jit
def _end(
    result, all_sums, sums, scale, bias, residual, first_row, first_token, outputs, tokens,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, LATE: gl.constexpr, DIVIDES: gl.constexpr,
):  # fmt: skip
    """Store what a program found: results, or its share of them."""
    SUMS: gl.constexpr = sums.type.layout
    row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, SUMS))
    safe = gl.minimum(row, outputs - 1)
    if LATE:
        whole = gl.load(scale + safe).to(gl.float32)
        if DIVIDES:
            whole = 1.0 / whole
        sums *= whole[:, None]
    mask = (row < outputs)[:, None] & (token < tokens)[None, :]
    where = token.to(gl.int64)[None, :] * outputs + row[:, None]
    if all_sums is not None:
        gl.store(all_sums + gl.program_id(1).to(gl.int64) * tokens * outputs + where, sums, mask=mask)
    else:
        if bias is not None:
            sums += gl.load(bias + safe).to(gl.float32)[:, None]
        if residual is not None:
            sums += gl.load(residual + where, mask=mask, other=0.0).to(gl.float32)
        gl.store(result + where, sums.to(result.dtype.element_ty), mask=mask)


@gluon.jit
def _fetch(
    inputs, codes, q_tiles, x_tiles, arrived, row, token, tile, stage, wanted,
    COLUMNS: gl.constexpr, WORDS: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Ask for a tile of codes and the inputs that it meets."""
    there = arrived.index(stage)
    mbarrier.expect(there, BYTES, pred=wanted)
    tma.async_copy_global_to_shared(codes, [row, tile * WORDS], there, q_tiles.index(stage), pred=wanted)
    tma.async_copy_global_to_shared(inputs, [token, tile * COLUMNS], there, x_tiles.index(stage), pred=wanted)


@gluon.jit
def _scales(
    scale, offset, row, outputs, tile, groups,
    GROUP: gl.constexpr, COLUMNS: gl.constexpr, GROUPS: gl.constexpr, SPREAD: gl.constexpr,
):  # fmt: skip
    """As they are stored, of a tile's groups: [rows, groups]; something unused where there is no offset."""
    if GROUP == 0:
        first = 0
    elif GROUP <= COLUMNS:
        first = tile * GROUPS
    else:
        first = tile // (GROUP // COLUMNS)
    group = first + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, gl.SliceLayout(2, SPREAD)))
    there = gl.minimum(row, outputs - 1)[:, None] * groups + group[None, :]
    each = gl.load(scale + there)
    low = each
    if offset is not None:
        low = gl.load(offset + there)
    return each, low


@gluon.jit
def _meaning(
    each, low, offset, SPREAD: gl.constexpr, FACTOR: gl.constexpr, DIVIDES: gl.constexpr, LEVELS: gl.constexpr
):
    """What numbers are multiplied with, and what is added then, [rows, words]."""
    step = each.to(gl.float32)
    if DIVIDES:
        step = gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [step], gl.float32, True, 1)
    middle = gl.zeros_like(step)
    if offset is not None:
        middle = low.to(gl.float32) + step * (LEVELS // 2)
    return _spread(step.to(gl.bfloat16), SPREAD, FACTOR), _spread(middle.to(gl.bfloat16), SPREAD, FACTOR)


@gluon.jit
def _spread(values, SPREAD: gl.constexpr, FACTOR: gl.constexpr):
    """[rows, groups] -> [rows, words]"""
    ROWS: gl.constexpr = SPREAD.shape[0]
    GROUPS: gl.constexpr = SPREAD.shape[1]
    EACH: gl.constexpr = SPREAD.shape[2]
    whole = gl.full([ROWS, GROUPS, EACH], 0, values.dtype, SPREAD)
    whole, _ = gl.broadcast(gl.expand_dims(values, 2), whole)
    return gl.convert_layout(gl.reshape(whole, [ROWS, GROUPS * EACH]), FACTOR)
