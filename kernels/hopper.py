"""The mixture's matrix products on Hopper (compute capability 9.0), in Gluon: what kernels/products.py says, scheduled.

The mathematics is that of `kernels.products`. Three things are done here that Triton's own scheduling does not do:

    warp specialisation   One warp (or four, where it gathers tokens) brings tiles of both operands into a ring of
                          shared memory; two warpgroups multiply, each its own 64 of a tile's 128 rows with the same
                          256 columns. While one of them stores its result the other keeps the tensor cores busy, and
                          one whose rows all lie past an expert's last row skips its products.
    meeting               Programs that share operands in L2 drift apart, until what one has read is gone when the next
                          comes (dbrx's product of a and w2 on an H100: 24.5 GB from memory instead of 8.6, 453
                          instead of 737 TFLOP/s). Every MEET steps (where tiles differ: every few tiles) the producers
                          wait for each other, shortly, and never again after a wait in vain, as where another kernel
                          holds multiprocessors: then they drift. No result depends on it.
    epilogue              A finished tile leaves in quarters of 64 columns, one being written to memory while the next
                          is computed; forward h, u and act(h) u leave together.

Operands are bfloat16 or float16, sums float32, in a fixed order. Warpgroups, wgmma, TMA and mbarriers: PTX ISA,
sections "Asynchronous warpgroup level matrix instructions" and "mbarrier"; the roles are those of CUTLASS's
warp-specialised kernels.

Legend: T tokens, N rows = T*K assignments, E experts, D model width, F expert width.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RUF005
# Triton has no starred expressions.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.products import activate, in_groups

ROWS = gl.constexpr(128)  # of a tile, 64 for each of two warpgroups
COLUMNS = gl.constexpr(256)
DEPTH = gl.constexpr(64)
QUARTER = gl.constexpr(64)  # columns that leave shared memory together
MEET = gl.constexpr(64)  # steps
PATIENCE = gl.constexpr(100)  # looks at the counter, some tens of microseconds
RAGGED = gl.constexpr(1 << 30)  # rows of a ragged descriptor: triton.tools.ragged_tma
_RESULT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))

# Triton 3.7 renamed these.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
save = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
load_each = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def meet(counter, target, patience):
    """Wait until `target` programs have come here; returns the patience that is left, none after a wait in vain."""
    seen = gl.atomic_add(counter, 1, sem="relaxed") + 1
    looks = 0
    while (seen < target) & (looks < patience):
        seen = gl.load(counter, volatile=True)
        looks += 1
    return gl.where(seen < target, 0, patience)


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The ring's next slot, and the parity of its barriers' phase."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def multiply_slot(ring, slot, phase, a, b, acc, GATHER: gl.constexpr):
    """acc + a b of the slot's tiles, and the next slot."""
    _, _, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(slot), phase)
    if GATHER:  # written by threads, read by the tensor cores
        fence_async_shared()
    acc = warpgroup_mma(a, b, acc, is_async=True)
    # The other warpgroup's products run while this one waits.
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = next_slot(slot, phase, STAGES)
    return acc, slot, phase


@gluon.jit
def multiply(ring, slot, phase, steps, WHICH: gl.constexpr, A_BY_DEPTH: gl.constexpr, B_BY_DEPTH: gl.constexpr,
              GATHER: gl.constexpr):  # fmt: skip
    """The sum over `steps` slots of the ring: [64, COLUMNS] float32, and where the ring goes on."""
    a_tiles, b_tiles, _, _ = ring
    acc = gl.zeros([64, COLUMNS], gl.float32, _RESULT)
    for _ in range(steps):
        if A_BY_DEPTH:
            a = a_tiles.index(2 * slot + WHICH).reshape([DEPTH, 64]).permute((1, 0))
        else:
            a = a_tiles.index(2 * slot + WHICH)
        if B_BY_DEPTH:
            b = b_tiles.index(slot).reshape([DEPTH, COLUMNS])
        else:
            b = b_tiles.index(slot).reshape([COLUMNS, DEPTH]).permute((1, 0))
        acc, slot, phase = multiply_slot(ring, slot, phase, a, b, acc, GATHER)
    return acc, slot, phase


@gluon.jit
def pass_over(ring, slot, phase, steps):
    """Release `steps` slots unused."""
    _, _, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    for _ in range(steps):
        mbarrier.wait(full.index(slot), phase)
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def halves(x):
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()


@gluon.jit
def quarters(x):
    first, second = halves(x)
    a, b = halves(first)
    c, d = halves(second)
    return a, b, c, d


@gluon.jit
def put(buffer, value, dtype: gl.constexpr):
    buffer.reshape([value.shape[0], value.shape[1]]).store(value.to(dtype))


@gluon.jit
def _save_rows(c, buffer, begin, end, row, column):
    """The buffer's rows before `end` to c[row, column], c a ragged descriptor over [N, columns]."""
    save(c, [RAGGED, end, RAGGED - (end - begin) + (row - begin), column], buffer)


@gluon.jit
def _store_rows(c, buffer, value, begin, end, row, column):
    """The same from registers, once at most one earlier store still reads shared memory."""
    tma.store_wait(1)
    put(buffer, value, c.dtype)
    fence_async_shared()
    _save_rows(c, buffer, begin, end, row, column)


@gluon.jit
def _finish(buffers, acc, c, c2, c3, begin, end, row, column, GATED: gl.constexpr, ACTIVATION: gl.constexpr):
    """The tile to c, or h and u and act(h) u to c, c2 and c3."""
    even = buffers.index(0)
    odd = buffers.index(1)
    p, q, r, s = quarters(acc)
    if ACTIVATION == "":
        _store_rows(c, even, p, begin, end, row, column)
        _store_rows(c, odd, q, begin, end, row, column + QUARTER)
        _store_rows(c, even, r, begin, end, row, column + 2 * QUARTER)
        _store_rows(c, odd, s, begin, end, row, column + 3 * QUARTER)
    elif GATED:
        _store_rows(c, even, p, begin, end, row, column)
        _store_rows(c2, odd, r, begin, end, row, column)
        value, _ = activate(p, ACTIVATION)
        _store_rows(c3, even, value * r, begin, end, row, column)
        _store_rows(c, odd, q, begin, end, row, column + QUARTER)
        _store_rows(c2, even, s, begin, end, row, column + QUARTER)
        value, _ = activate(q, ACTIVATION)
        _store_rows(c3, odd, value * s, begin, end, row, column + QUARTER)
    else:
        parts = (p, q, r, s)
        for i in gl.static_range(4):
            value, _ = activate(parts[i], ACTIVATION)
            _store_rows(c, even, parts[i], begin, end, row, column + i * QUARTER)
            _store_rows(c3, odd, value, begin, end, row, column + i * QUARTER)


@gluon.jit
def _produce_rows(
    ring, a, token, a_row, b, b2, counter, tile_expert, tile_row, tile_count, columns, depth, N,
    PAIR: gl.constexpr, BY_DEPTH: gl.constexpr, GATED: gl.constexpr, GATHER: gl.constexpr, EVEN: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    a_tiles, b_tiles, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    WIDTH: gl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    row_tiles = gl.load(tile_count)
    column_tiles = gl.cdiv(columns, WIDTH)
    tiles = row_tiles * column_tiles
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    together = tiles // programs * gl.cdiv(depth, DEPTH) * PAIR  # steps that all programs have
    slot = 0
    phase = 1
    step = 0
    target = 0
    patience = gl.to_tensor(PATIENCE)
    # The tile after the next is looked up while one is loaded.
    row_tile, column_tile = in_groups(gl.minimum(pid, tiles - 1), row_tiles, column_tiles, GROUP)
    expert, row = gl.load(tile_expert + row_tile), gl.load(tile_row + row_tile)
    row_tile, column_tile_1 = in_groups(gl.minimum(pid + programs, tiles - 1), row_tiles, column_tiles, GROUP)
    expert_1, row_1 = gl.load(tile_expert + row_tile), gl.load(tile_row + row_tile)
    if GATHER:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        r = gl.arange(0, 64, gl.SliceLayout(1, layout))
        d = gl.arange(0, DEPTH, gl.SliceLayout(0, layout))
        # Rows past the expert's last are another's: computed, and not stored.
        t_0 = gl.load(token + gl.minimum(row + r, N - 1))
        t_1 = gl.load(token + gl.minimum(row + 64 + r, N - 1))
    for tile in range(pid, tiles, programs):
        row_tile, column_tile_2 = in_groups(gl.minimum(tile + 2 * programs, tiles - 1), row_tiles, column_tiles, GROUP)
        expert_2, row_2 = gl.load(tile_expert + row_tile), gl.load(tile_row + row_tile)
        if GATHER:
            a_0 = a + t_0.to(gl.int64)[:, None] * a_row + d[None, :]
            a_1 = a + t_1.to(gl.int64)[:, None] * a_row + d[None, :]
            t_0 = gl.load(token + gl.minimum(row_1 + r, N - 1))
            t_1 = gl.load(token + gl.minimum(row_1 + 64 + r, N - 1))
        column = column_tile * WIDTH
        for half in gl.static_range(PAIR):
            for k in range(0, depth, DEPTH):
                if (step % MEET == 0) & (step < together):
                    target += programs
                    patience = meet(counter, target, patience)
                step += 1
                mbarrier.wait(empty.index(slot), phase)
                bar = full.index(slot)
                mbarrier.expect(bar, ((0 if GATHER else ROWS) + COLUMNS) * DEPTH * 2)
                if GATED:
                    load(b, [expert, column, k], bar, b_tiles.index(slot).slice(0, 1, dim=0))
                    load(b2, [expert, column, k], bar, b_tiles.index(slot).slice(1, 1, dim=0))
                elif BY_DEPTH:
                    load(b2 if half else b, [expert, k, column], bar, b_tiles.index(slot))
                else:
                    load(b, [expert, column, k], bar, b_tiles.index(slot))
                if GATHER:
                    if EVEN:
                        load_each(a_tiles.index(2 * slot), a_0 + k)
                        load_each(a_tiles.index(2 * slot + 1), a_1 + k)
                    else:
                        mask = (k + d < depth)[None, :]
                        load_each(a_tiles.index(2 * slot), a_0 + k, mask=mask)
                        load_each(a_tiles.index(2 * slot + 1), a_1 + k, mask=mask)
                    async_copy.mbarrier_arrive(bar, increment_count=False)
                else:
                    load(a, [row + half * N, k], bar, a_tiles.index(2 * slot))
                    load(a, [row + half * N + 64, k], bar, a_tiles.index(2 * slot + 1))
                slot, phase = next_slot(slot, phase, STAGES)
        expert, row, column_tile = expert_1, row_1, column_tile_1
        expert_1, row_1, column_tile_1 = expert_2, row_2, column_tile_2


@gluon.jit
def _consume_rows(
    ring, buffers, c, c2, c3, offsets, tile_expert, tile_row, tile_count, columns, depth,
    WHICH: gl.constexpr, PAIR: gl.constexpr, BY_DEPTH: gl.constexpr, GATED: gl.constexpr, GATHER: gl.constexpr,
    ACTIVATION: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    row_tiles = gl.load(tile_count)
    column_tiles = gl.cdiv(columns, WIDTH)
    steps = gl.cdiv(depth, DEPTH) * PAIR
    tiles = row_tiles * column_tiles
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    slot = 0
    phase = 0
    # As the producer does: no product waits until its tile is looked up.
    row_tile, column_tile = in_groups(gl.minimum(pid, tiles - 1), row_tiles, column_tiles, GROUP)
    expert, first = gl.load(tile_expert + row_tile), gl.load(tile_row + row_tile)
    begin, end = gl.load(offsets + expert), gl.load(offsets + expert + 1)
    row_tile, column_tile_1 = in_groups(gl.minimum(pid + programs, tiles - 1), row_tiles, column_tiles, GROUP)
    expert_1, first_1 = gl.load(tile_expert + row_tile), gl.load(tile_row + row_tile)
    for tile in range(pid, tiles, programs):
        begin_1, end_1 = gl.load(offsets + expert_1), gl.load(offsets + expert_1 + 1)
        row_tile, column_tile_2 = in_groups(gl.minimum(tile + 2 * programs, tiles - 1), row_tiles, column_tiles, GROUP)
        expert_2, first_2 = gl.load(tile_expert + row_tile), gl.load(tile_row + row_tile)
        row = first + 64 * WHICH
        column = column_tile * WIDTH
        if row < end:
            acc, slot, phase = multiply(ring, slot, phase, steps, WHICH, False, BY_DEPTH, GATHER)
            _finish(buffers, acc, c, c2, c3, begin, end, row, column, GATED, ACTIVATION)
        else:
            slot, phase = pass_over(ring, slot, phase, steps)
        first, begin, end, column_tile = first_1, begin_1, end_1, column_tile_1
        expert_1, first_1, column_tile_1 = expert_2, first_2, column_tile_2
    tma.store_wait(0)


@gluon.jit
def make_ring(a_tiles, b_tiles, STAGES: gl.constexpr, GATHER: gl.constexpr):
    """The ring with its barriers: a slot is full when its bytes, and a gather's 128 threads, have arrived."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if GATHER else 1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()  # TMA, too, sees the barriers as they are now
    return a_tiles, b_tiles, full, empty


@gluon.jit(do_not_specialize=["N"])
def rows_kernel(
    a, token, a_row, b, b2, c, c2, c3, counter, offsets, tile_expert, tile_row, tile_count, columns, depth, N,
    PAIR: gl.constexpr, BY_DEPTH: gl.constexpr, GATED: gl.constexpr, GATHER: gl.constexpr, EVEN: gl.constexpr,
    ACTIVATION: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """c = a b^T by expert; with ACTIVATION h = a b^T to c, GATED u = a b2^T to c2, and act(h) u to c3.

    a: descriptor of [PAIR*N, depth], or with GATHER a pointer to tokens [T, depth]. b, b2: descriptors of
    [E, columns, depth], or BY_DEPTH [E, depth, columns]; PAIR = 2 sums a's second half with b2. counter: zero.
    EVEN: depth is a multiple of DEPTH.
    """
    a_tiles = gl.allocate_shared_memory(b.dtype, [2 * STAGES, 64, DEPTH], TILE)
    if GATED:
        b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES, 2, COLUMNS // 2, DEPTH], b.layout)
    else:
        b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_type.shape, b.layout)
    mine = gl.allocate_shared_memory(c.dtype, [2] + c.block_type.shape, c.layout)
    other = gl.allocate_shared_memory(c.dtype, [2] + c.block_type.shape, c.layout)
    ring = make_ring(a_tiles, b_tiles, STAGES, GATHER)
    gl.warp_specialize(
        [
            (_consume_rows, (ring, mine, c, c2, c3, offsets, tile_expert, tile_row, tile_count, columns, depth,
                             gl.constexpr(0), PAIR, BY_DEPTH, GATED, GATHER, ACTIVATION, GROUP)),
            (_consume_rows, (ring, other, c, c2, c3, offsets, tile_expert, tile_row, tile_count, columns, depth,
                             gl.constexpr(1), PAIR, BY_DEPTH, GATED, GATHER, ACTIVATION, GROUP)),
            (_produce_rows, (ring, a, token, a_row, b, b2, counter, tile_expert, tile_row, tile_count, columns, depth,
                             N, PAIR, BY_DEPTH, GATED, GATHER, EVEN, GROUP)),
        ],
        [4, 4 if GATHER else 1],
        [208 if GATHER else 232, 88 if GATHER else 40],
    )  # fmt: skip
