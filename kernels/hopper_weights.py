"""The gradients of experts' weights on Hopper: kernels/hopper.py's products, summed over an expert's rows.

    c[e, :, :] = sum over the rows n of e of left[n, :]^T right[n, :]

Both operands are read by rows and multiplied transposed: the sum runs over rows. What lies past an expert's last row
counts as zero on both sides: nothing of another expert's, not even NaN, reaches the sum.

Legend: T tokens, N rows = T*K assignments, E experts.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RUF005
# Triton has no starred expressions.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from kernels.hopper import (
    COLUMNS,
    DEPTH,
    PATIENCE,
    QUARTER,
    RAGGED,
    ROWS,
    TILE,
    load,
    load_each,
    make_ring,
    meet,
    multiply,
    next_slot,
    put,
    quarters,
    save,
)
from kernels.products import in_groups


@gluon.jit
def _produce_weights(
    ring, left, right, token, right_row, counter, offsets, E, rows, columns, N, between,
    HALVES: gl.constexpr, GATHER: gl.constexpr, EVEN: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    a_tiles, b_tiles, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    row_tiles = gl.cdiv(rows, ROWS)
    column_tiles = gl.cdiv(columns, COLUMNS)
    tiles = row_tiles * column_tiles
    programs = gl.num_programs(0)
    together = E * HALVES * tiles // programs * programs
    slot = 0
    phase = 1
    target = 0
    patience = gl.to_tensor(PATIENCE)
    if GATHER:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        r = gl.arange(0, DEPTH, gl.SliceLayout(1, layout))
        d = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    for tile in range(gl.program_id(0), E * HALVES * tiles, programs):
        if (tile < together) & (tile // programs % between == 0):
            target += programs
            patience = meet(counter, target, patience)
        # Both halves of an expert follow each other: they share the rows of `right` in L2.
        expert = tile // (HALVES * tiles)
        half = (tile // tiles) % HALVES
        row_tile, column_tile = in_groups(tile % tiles, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS
        column = column_tile * COLUMNS
        begin = gl.load(offsets + expert)
        end = gl.load(offsets + expert + 1)
        if GATHER:
            first = right + (column + d)[None, :]
            t = gl.load(token + gl.minimum(begin + r, N - 1))
        for k in range(0, end - begin, DEPTH):
            if GATHER:
                pointers = first + t.to(gl.int64)[:, None] * right_row
                # Rows past the expert's last count as zero on both sides: nothing of theirs, not even NaN, is summed.
                mask = (begin + k + r < end)[:, None]
                if not EVEN:
                    mask = mask & (column + d < columns)[None, :]
                t = gl.load(token + gl.minimum(begin + k + DEPTH + r, N - 1))
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, (ROWS + (0 if GATHER else COLUMNS)) * DEPTH * 2)
            inside = RAGGED - (end - begin) + k
            load(left, [RAGGED, end + half * N, inside, row], bar, a_tiles.index(2 * slot))
            load(left, [RAGGED, end + half * N, inside, row + 64], bar, a_tiles.index(2 * slot + 1))
            if GATHER:
                load_each(b_tiles.index(slot), pointers, mask=mask)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                load(right, [RAGGED, end, inside, column], bar, b_tiles.index(slot))
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _consume_weights(
    ring, buffers, c, c2, offsets, E, rows, columns,
    WHICH: gl.constexpr, HALVES: gl.constexpr, GATHER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(rows, ROWS)
    column_tiles = gl.cdiv(columns, COLUMNS)
    tiles = row_tiles * column_tiles
    programs = gl.num_programs(0)
    slot = 0
    phase = 0
    expert = gl.program_id(0) // (HALVES * tiles)
    count = gl.load(offsets + expert + 1) - gl.load(offsets + expert)
    for tile in range(gl.program_id(0), E * HALVES * tiles, programs):
        # The next tile is looked up while this one is computed.
        following = gl.minimum((tile + programs) // (HALVES * tiles), E - 1)
        begin_1, end_1 = gl.load(offsets + following), gl.load(offsets + following + 1)
        expert = tile // (HALVES * tiles)
        half = (tile // tiles) % HALVES
        row_tile, column_tile = in_groups(tile % tiles, row_tiles, column_tiles, GROUP)
        row = row_tile * ROWS + 64 * WHICH
        column = column_tile * COLUMNS
        gl.assume(count >= 0)  # Triton drops what a loop carries if it only bounds another loop
        acc, slot, phase = multiply(ring, slot, phase, gl.cdiv(count, DEPTH), WHICH, True, True, GATHER)
        parts = quarters(acc)
        for i in gl.static_range(4):
            buffer = buffers.index(i % 2)
            tma.store_wait(1)
            put(buffer, parts[i], c.dtype)
            fence_async_shared()
            if half == 0:
                save(c, [expert, row, column + i * QUARTER], buffer)
            else:
                save(c2, [expert, row, column + i * QUARTER], buffer)
        count = end_1 - begin_1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "between"])
def weights_kernel(
    left, right, token, right_row, c, c2, counter, offsets, E, rows, columns, N, between,
    HALVES: gl.constexpr, GATHER: gl.constexpr, EVEN: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """c[e] = left^T right over e's rows, c2 of left's second half; zeros for an expert without rows.

    left: ragged descriptor of [HALVES*N, rows]. right: ragged descriptor of [N, columns], or with GATHER a pointer to
    tokens [T, columns]. c, c2: descriptors of [E, rows, columns]. counter: zero. between: tiles from one meeting to
    the next. EVEN: columns is a multiple of COLUMNS.
    """
    a_tiles = gl.allocate_shared_memory(c.dtype, [2 * STAGES] + left.block_type.shape, left.layout)
    if GATHER:
        b_tiles = gl.allocate_shared_memory(c.dtype, [STAGES, DEPTH, COLUMNS], TILE)
    else:
        b_tiles = gl.allocate_shared_memory(c.dtype, [STAGES] + right.block_type.shape, right.layout)
    mine = gl.allocate_shared_memory(c.dtype, [2] + c.block_type.shape, c.layout)
    other = gl.allocate_shared_memory(c.dtype, [2] + c.block_type.shape, c.layout)
    ring = make_ring(a_tiles, b_tiles, STAGES, GATHER)
    gl.warp_specialize(
        [
            (_consume_weights, (ring, mine, c, c2, offsets, E, rows, columns, gl.constexpr(0), HALVES, GATHER, GROUP)),
            (_consume_weights, (ring, other, c, c2, offsets, E, rows, columns, gl.constexpr(1), HALVES, GATHER, GROUP)),
            (_produce_weights, (ring, left, right, token, right_row, counter, offsets, E, rows, columns, N, between,
                                HALVES, GATHER, EVEN, GROUP)),
        ],
        [4, 4 if GATHER else 1],
        [200 if GATHER else 232, 104 if GATHER else 40],
    )  # fmt: skip
