"""The matrix products of a dropless mixture of experts, over rows that are sorted by expert.

Two products do all of it (MegaBlocks, section 4: the block-diagonal SDD, DSD and their transposes; here the diagonal's
blocks are found by the routing's tile map, and rows need no padding to blocks):

    rows       c[n, :] = sum over depth of a[n, depth] b[e(n), depth, :]          (forward, and gradients of rows)
    weights    c[e, :, :] = sum over the rows n of e of left[n, :]^T right[n, :]  (gradients of weights)

Each is a persistent loop over the tiles of its result with one matrix product a step. Its operands stream through
shared memory: dense ones by TMA descriptors, rows of tokens (a gather, which Hopper's TMA lacks) by pointers, so that
no sorted copy of the tokens need exist. What is two products in the formulas is one here: gate and up projection are
the two halves of a tile's columns, their gradients two halves of the depth, which a descriptor addresses together by
the distance between the two tensors. Forward, `rows` applies the activation
to the finished tile in registers, which spares it its own passes over memory.

What lies past an expert's last row is computed and not stored in `rows`, where a row cannot reach another; in
`weights`, which sums over rows, it counts as zero on both sides (ragged descriptors, triton.tools.ragged_tma). All sums
have a fixed order: the same bits every time. Long float32 sums are made in runs of eight steps, since one long float32
sum rounds by its length.

Legend: T tokens, N rows = T*K assignments, E experts, D model width, F expert width.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives meaning to a kernel's annotations: a parameter without one is a run-time value.
from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.ragged_tma import to_ragged_indices


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """act(h) and act'(h), h in float32."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(h)
        value = h * s
        slope = s * (1 + h * (1 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(h * 0.7071067811865476))
        value = h * cdf
        slope = cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    else:
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        value = h * s
        slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    return value, slope


@triton.jit
def in_groups(tile, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile's number: GROUP rows walk through the columns together and share these in L2."""
    size = GROUP * columns
    first = (tile // size) * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + (tile % size) % height, (tile % size) // height


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _store_rows(c, tile, begin, end, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile's rows before `end` to c[row, column], c a ragged descriptor over [N, columns]."""
    past, last, first = to_ragged_indices(begin, end - begin, row - begin)
    c.store([past, last, first, column], tl.reshape(tile.to(c.dtype), [1, 1, ROWS, COLUMNS]))


@triton.jit(do_not_specialize=["swap"])  # it follows from addresses
def rows_kernel(
    a, b, c, c2, c3, token, offsets, tile_expert, tile_row, tile_count, a_row, columns, depth, swap,
    EVEN_DEPTH: tl.constexpr, GATHER: tl.constexpr, BY_DEPTH: tl.constexpr, PAIR: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, RUNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """c = a b^T by expert; with ACTIVATION h = a b^T to c, GATED u of b's second half to c2, and act(h) u to c3.

    a: descriptor of [1 or 2, N, depth], or with GATHER a pointer to tokens [T, depth]. b: descriptor of
    [E, 1 or 2, columns, depth], or BY_DEPTH [E, 1 or 2, depth, columns]. PAIR: the sum goes over both halves of a
    and b. swap: b's second half comes first in memory.
    """
    # A gated tile's columns are half as many of each half of b.
    WIDTH: tl.constexpr = BN // 2 if GATED else BN
    row_tiles = tl.load(tile_count)
    column_tiles = tl.cdiv(columns, WIDTH)
    steps = tl.cdiv(depth, BK)
    total_steps = steps * 2 if PAIR else steps
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = in_groups(tile, row_tiles, column_tiles, GROUP)
        expert = tl.load(tile_expert + row_tile)
        row = tl.load(tile_row + row_tile)
        begin = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        column = column_tile * WIDTH
        if GATHER:
            t = tl.load(token + tl.minimum(row + tl.arange(0, BM), end - 1)).to(tl.int64)
            pointers = a + t[:, None] * a_row + tl.arange(0, BK)[None, :]

        acc = tl.zeros((BM, BN), tl.float32)
        if RUNS:
            run = tl.zeros((BM, BN), tl.float32)
        for step in range(total_steps):
            half = 0
            if PAIR:
                half = step // steps
            k = (step - half * steps) * BK
            if GATHER:
                if EVEN_DEPTH:
                    a_tile = tl.load(pointers + k)
                else:
                    a_tile = tl.load(pointers + k, (k + tl.arange(0, BK) < depth)[None, :], other=0.0)
            else:
                a_tile = tl.reshape(a.load([half ^ swap if PAIR else 0, row, k]), [BM, BK])
            if BY_DEPTH:
                b_tile = tl.reshape(b.load([expert, half, k, column]), [BK, BN])
            else:
                b_tile = tl.reshape(b.load([expert, 0, column, k]), [BN, BK]).T
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
            if RUNS:
                full = step % 8 == 7
                run += tl.where(full, acc, 0.0)
                acc = tl.where(full, 0.0, acc)
        if RUNS:
            acc += run

        if ACTIVATION == "":
            _store_rows(c, acc, begin, end, row, column, BM, BN)
        elif GATED:
            first, second = _halves(acc, BM, BN)
            h = tl.where(swap == 0, first, second)
            u = tl.where(swap == 0, second, first)
            value, _ = activate(h, ACTIVATION)
            _store_rows(c, h, begin, end, row, column, BM, WIDTH)
            _store_rows(c2, u, begin, end, row, column, BM, WIDTH)
            _store_rows(c3, value * u, begin, end, row, column, BM, WIDTH)
        else:
            value, _ = activate(acc, ACTIVATION)
            _store_rows(c, acc, begin, end, row, column, BM, BN)
            _store_rows(c3, value, begin, end, row, column, BM, BN)


@triton.jit(do_not_specialize=["swap"])
def weights_kernel(
    left, right, c, token, offsets, right_row, E, rows, columns, swap,
    HALVES: tl.constexpr, EVEN_COLUMNS: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr, RUNS: tl.constexpr,
    BF: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """c[e, half] = left[half]^T right over e's rows; zeros for an expert without rows.

    left: ragged descriptor of [HALVES, N, rows]. right: ragged descriptor of [N, columns], or with GATHER a pointer to
    tokens [T, columns]. c: descriptor of [E, HALVES, rows, columns]; swap: its second half comes first.
    """
    row_tiles = tl.cdiv(rows, BF)
    column_tiles = tl.cdiv(columns, BD)
    tiles = row_tiles * column_tiles
    for tile in tl.range(tl.program_id(0), E * HALVES * tiles, tl.num_programs(0), flatten=FLATTEN):
        # Both halves of an expert follow each other: they share the rows of `right` in L2.
        expert = tile // (HALVES * tiles)
        half = (tile // tiles) % HALVES
        row_tile, column_tile = in_groups(tile % tiles, row_tiles, column_tiles, GROUP)
        begin = tl.load(offsets + expert)
        end = tl.load(offsets + expert + 1)
        row = row_tile * BF
        column = column_tile * BD
        acc = tl.zeros((BF, BD), tl.float32)
        if RUNS:
            run = tl.zeros((BF, BD), tl.float32)
        for step in range(tl.cdiv(end - begin, BR)):
            past, last, first = to_ragged_indices(begin, end - begin, step * BR)
            if GATHER:
                n = begin + step * BR + tl.arange(0, BR)
                d = column + tl.arange(0, BD)
                t = tl.load(token + n, n < end, other=0).to(tl.int64)
                mask = (n < end)[:, None]
                if not EVEN_COLUMNS:
                    mask = mask & (d < columns)[None, :]
                r_tile = tl.load(right + t[:, None] * right_row + d[None, :], mask, other=0.0)
            else:
                r_tile = tl.reshape(right.load([past, last, first, column]), [BR, BD])
            l_tile = tl.reshape(left.load([past, last, half, first, row]), [BR, BF])
            acc = tl.dot(l_tile.T, r_tile, acc, input_precision=PRECISION)
            if RUNS:
                full = step % 8 == 7
                run += tl.where(full, acc, 0.0)
                acc = tl.where(full, 0.0, acc)
        if RUNS:
            acc += run
        c.store([expert, half ^ swap, row, column], tl.reshape(acc.to(c.dtype), [1, 1, BF, BD]))


@triton.jit(do_not_specialize=["N"])
def activate_backward_kernel(
    g, h, u, du, wa, weight, dweight, order, N, F,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward through a = act(h) u, ROWS rows of g at a time: dh over g, du, weight * a, and dweight = <g, a>."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    assignment = tl.load(order + n, n < N, other=0)
    scale = tl.load(weight + assignment, n < N, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        mask = (n < N)[:, None] & (f < F)[None, :]
        at = n.to(tl.int64)[:, None] * F + f[None, :]
        value, slope = activate(tl.load(h + at, mask, other=0.0).to(tl.float32), ACTIVATION)
        dy = tl.load(g + at, mask, other=0.0).to(tl.float32)
        da = scale * dy
        if GATED:
            up = tl.load(u + at, mask, other=0.0).to(tl.float32)
            tl.store(du + at, (da * value).to(du.dtype.element_ty), mask)
            value *= up
            slope *= up
        total += dy * value
        tl.store(g + at, (da * slope).to(g.dtype.element_ty), mask)
        tl.store(wa + at, (scale * value).to(wa.dtype.element_ty), mask)
    tl.store(dweight + assignment, tl.sum(total, 1).to(dweight.dtype.element_ty), n < N)


@triton.jit
def copy_kernel(x, inverse, y, x_row, D, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """y[inverse[t, k]] = x[t]: a token's row is read once and written to each of its places among the sorted rows."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(x + t * x_row + d, d < D)
    for k in tl.static_range(TOP_K):
        n = tl.load(inverse + t * TOP_K + k).to(tl.int64)
        tl.store(y + n * D + d, row, d < D)


@triton.jit
def combine_kernel(
    rows, weight, inverse, y, D, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y[t] = sum over k of weight[t, k] rows[inverse[t, k]]"""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        assignment = t * TOP_K + k
        n = tl.load(inverse + assignment).to(tl.int64)
        value = tl.load(rows + n * D + d, d < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + assignment).to(tl.float32)
        acc += value
    tl.store(y + t * D + d, acc.to(y.dtype.element_ty), d < D)
