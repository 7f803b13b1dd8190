"""The block-sparse products on Hopper, for blocks of 128: what kernels/sparse_products.py says, scheduled by hand.

Roles, ring and meeting are kernels/hopper.py's. A tile of the result is 256 x 128 or 128 x 256, half of it for each of
two warpgroups: one operand's tile they share, of the other each has its own.

    sdd    two entries of one row (or column): they share a's rows (or b's columns)
    dsd    one row of blocks by 256 columns: they share the sparse block
    dds    256 rows by one column of blocks: the same

So a step brings 48 KiB for 2^21 multiply-adds, as much as a dense product's; entries taken one by one need a third
more. Rows of blocks are taken by their length, the longest first: of programs that take tiles in turn each then comes
to about the same work.

Legend: R rows of blocks, C columns of blocks, Z entries; of a product M rows, N columns and K summed over.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: RUF005
# Triton has no starred expressions.
from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels.hopper import (
    DEPTH,
    MEET,
    PATIENCE,
    halves,
    load,
    make_ring,
    meet,
    multiply_slot,
    next_slot,
    pass_over,
    put,
    save,
)
from kernels.hopper_launch import OPTIONS, descriptor, programs, tiles_a_meeting
from kernels.products import in_groups
from kernels.topology import Topology

BLOCK = gl.constexpr(128)
_RESULT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
_GROUP = 16  # rows of blocks that go through the columns together


@gluon.jit
def _load_step(
    ring, slot, phase, shared, own, first, second, both, row, shared_depth, depth,
    SAMPLED: gl.constexpr, SHARED_BY_DEPTH: gl.constexpr, OWN_BY_DEPTH: gl.constexpr,
):  # fmt: skip
    """One step's tiles: the shared one of `row`, and those of `first` and, where there are two, `second`."""
    shared_tiles, own_tiles, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(empty.index(slot), phase)
    bar = full.index(slot)
    if both:
        mbarrier.expect(bar, 3 * BLOCK * DEPTH * 2)
    else:
        mbarrier.expect(bar, 2 * BLOCK * DEPTH * 2)
    if not SHARED_BY_DEPTH:
        load(shared, [row, shared_depth], bar, shared_tiles.index(slot))
    elif SAMPLED:
        load(shared, [shared_depth, row], bar, shared_tiles.index(slot))
    else:  # blocks below one another
        load(shared, [row + shared_depth, 0], bar, shared_tiles.index(slot))
    if OWN_BY_DEPTH:
        load(own, [depth, first], bar, own_tiles.index(2 * slot))
        if both:
            load(own, [depth, second], bar, own_tiles.index(2 * slot + 1))
    else:
        load(own, [first, depth], bar, own_tiles.index(2 * slot))
        if both:
            load(own, [second, depth], bar, own_tiles.index(2 * slot + 1))
    return next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply(ring, slot, phase, steps, WHICH: gl.constexpr, SHARED_LEFT: gl.constexpr, SHARED_BY_DEPTH: gl.constexpr,
               OWN_BY_DEPTH: gl.constexpr):  # fmt: skip
    """The sum over `steps` slots of the ring: [BLOCK, BLOCK] float32, and where the ring goes on."""
    shared_tiles, own_tiles, _, _ = ring
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, _RESULT)
    for _ in range(steps):
        shared = shared_tiles.index(slot)
        own = own_tiles.index(2 * slot + WHICH)
        if SHARED_LEFT:
            a = shared.permute((1, 0)) if SHARED_BY_DEPTH else shared
            b = own if OWN_BY_DEPTH else own.permute((1, 0))
        else:
            a = own.permute((1, 0)) if OWN_BY_DEPTH else own
            b = shared if SHARED_BY_DEPTH else shared.permute((1, 0))
        acc, slot, phase = multiply_slot(ring, slot, phase, a, b, acc, False)
    return acc, slot, phase


@gluon.jit
def _store(buffers, acc, c, row, column):
    """The tile to c[row, column], a quarter leaving shared memory while the next is put there."""
    left, right = halves(acc)
    for i in gl.static_range(2):
        # A warp's registers hold its rows of the upper and of the lower half.
        upper, lower = (left, right)[i].reshape([2, BLOCK // 2, BLOCK // 2]).permute(1, 2, 0).split()
        tma.store_wait(1)
        put(buffers.index(0), upper, c.dtype)
        fence_async_shared()
        save(c, [row, column + i * (BLOCK // 2)], buffers.index(0))
        tma.store_wait(1)
        put(buffers.index(1), lower, c.dtype)
        fence_async_shared()
        save(c, [row + BLOCK // 2, column + i * (BLOCK // 2)], buffers.index(1))


@gluon.jit
def _produce_sdd(ring, shared, own, counter, pairs, row_indices, column_indices, walked, rows, depth, between,
                  SHARED_LEFT: gl.constexpr, SHARED_BY_DEPTH: gl.constexpr, OWN_BY_DEPTH: gl.constexpr):  # fmt: skip
    programs = gl.num_programs(0)
    together = walked // programs * programs
    slot = 0
    phase = 1
    target = 0
    patience = gl.to_tensor(PATIENCE)
    for pair in range(gl.program_id(0), walked, programs):
        first = gl.load(pairs + 2 * pair)
        second = gl.load(pairs + 2 * pair + 1)
        meets = (pair < together) & (pair // programs % between == 0)
        real = first >= 0
        if real:
            real = gl.load(row_indices + first) < rows
        if real:
            other = gl.where(second >= 0, second, first)
            if SHARED_LEFT:
                row = gl.load(row_indices + first) * BLOCK
                one = gl.load(column_indices + first) * BLOCK
                two = gl.load(column_indices + other) * BLOCK
            else:
                row = gl.load(column_indices + first) * BLOCK
                one = gl.load(row_indices + first) * BLOCK
                two = gl.load(row_indices + other) * BLOCK
            for k in range(0, depth, DEPTH):
                if (k % (MEET * DEPTH) == 0) & meets:
                    target += programs
                    patience = meet(counter, target, patience)
                slot, phase = _load_step(ring, slot, phase, shared, own, one, two, second >= 0, row, k, k,
                                         True, SHARED_BY_DEPTH, OWN_BY_DEPTH)  # fmt: skip
        elif meets:
            # Nobody waits for a program that has nothing to bring.
            meetings = gl.cdiv(depth, MEET * DEPTH)
            target += programs * meetings
            gl.atomic_add(counter, meetings, sem="relaxed")


@gluon.jit
def _consume_sdd(ring, buffers, values, pairs, row_indices, walked, rows, depth, WHICH: gl.constexpr,
                  SHARED_LEFT: gl.constexpr, SHARED_BY_DEPTH: gl.constexpr, OWN_BY_DEPTH: gl.constexpr):  # fmt: skip
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    slot = 0
    phase = 0
    # Pairs are looked up two ahead: no product waits for that.
    first, entry = gl.load(pairs + 2 * pid), gl.load(pairs + 2 * pid + WHICH)
    row = gl.load(row_indices + gl.maximum(first, 0))
    ahead = gl.minimum(pid + programs, walked - 1)
    first_1, entry_1 = gl.load(pairs + 2 * ahead), gl.load(pairs + 2 * ahead + WHICH)
    for pair in range(pid, walked, programs):
        row_1 = gl.load(row_indices + gl.maximum(first_1, 0))
        ahead = gl.minimum(pair + 2 * programs, walked - 1)
        first_2, entry_2 = gl.load(pairs + 2 * ahead), gl.load(pairs + 2 * ahead + WHICH)
        if first >= 0:
            steps = gl.where(row < rows, gl.cdiv(depth, DEPTH), 0)
            gl.assume(steps >= 0)  # Triton drops what a loop carries if it only bounds another loop
            if entry >= 0:
                acc, slot, phase = _multiply(
                    ring, slot, phase, steps, WHICH, SHARED_LEFT, SHARED_BY_DEPTH, OWN_BY_DEPTH
                )
                _store(buffers, acc, values, entry * BLOCK, 0)
            else:
                slot, phase = pass_over(ring, slot, phase, steps)
        first, entry, row = first_1, entry_1, row_1
        first_1, entry_1 = first_2, entry_2
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["walked", "rows", "depth", "between"])
def sdd_kernel(
    shared, own, values, counter, pairs, row_indices, column_indices, walked, rows, depth, between,
    SHARED_LEFT: gl.constexpr, SHARED_BY_DEPTH: gl.constexpr, OWN_BY_DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """values[entry] = the product's block there, for the entries of `walked` pairs; zeros in an inert entry.

    shared: the operand whose tile a pair shares, a if SHARED_LEFT, else b; own: the other. Descriptors of tiles
    [BLOCK, DEPTH], or BY_DEPTH [DEPTH, BLOCK]. pairs: Topology.pairs.
    counter: zero. between: pairs from one meeting to the next; within a pair they come every MEET steps.
    """
    shared_tiles = gl.allocate_shared_memory(shared.dtype, [STAGES] + shared.block_type.shape, shared.layout)
    own_tiles = gl.allocate_shared_memory(own.dtype, [2 * STAGES] + own.block_type.shape, own.layout)
    mine = gl.allocate_shared_memory(values.dtype, [2] + values.block_type.shape, values.layout)
    other = gl.allocate_shared_memory(values.dtype, [2] + values.block_type.shape, values.layout)
    ring = make_ring(shared_tiles, own_tiles, STAGES, False)
    gl.warp_specialize(
        [
            (_consume_sdd, (ring, mine, values, pairs, row_indices, walked, rows, depth, gl.constexpr(0), SHARED_LEFT,
                            SHARED_BY_DEPTH, OWN_BY_DEPTH)),
            (_consume_sdd, (ring, other, values, pairs, row_indices, walked, rows, depth, gl.constexpr(1), SHARED_LEFT,
                            SHARED_BY_DEPTH, OWN_BY_DEPTH)),
            (_produce_sdd, (ring, shared, own, counter, pairs, row_indices, column_indices, walked, rows, depth,
                            between, SHARED_LEFT, SHARED_BY_DEPTH, OWN_BY_DEPTH)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def _produce_product(
    ring, sparse, dense, counter, order, offsets, indices, places, rows, columns, between,
    PLACED: gl.constexpr, SPARSE_BY_DEPTH: gl.constexpr, DENSE_BY_DEPTH: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    column_tiles = gl.cdiv(columns, 2 * BLOCK)
    tiles = rows * column_tiles
    programs = gl.num_programs(0)
    together = tiles // programs * programs
    slot = 0
    phase = 1
    target = 0
    patience = gl.to_tensor(PATIENCE)
    for tile in range(gl.program_id(0), tiles, programs):
        if (tile < together) & (tile // programs % between == 0):
            target += programs
            patience = meet(counter, target, patience)
        position, column_tile = in_groups(tile, rows, column_tiles, GROUP)
        row = gl.load(order + position)
        begin = gl.load(offsets + row)
        end = gl.load(offsets + row + 1)
        one = column_tile * (2 * BLOCK)
        two = one + BLOCK
        # An entry is looked up while the one before it is loaded.
        ahead = gl.minimum(begin, gl.maximum(end - 1, 0))
        next_index = gl.load(indices + ahead)
        next_place = gl.load(places + ahead) if PLACED else ahead
        for entry in range(begin, end):
            # + 0: what a loop carries under two names, Triton has lost before.
            index = next_index + 0
            place = next_place + 0
            ahead = gl.minimum(entry + 1, end - 1)
            next_index = gl.load(indices + ahead)
            next_place = gl.load(places + ahead) if PLACED else ahead
            for within in gl.static_range(0, BLOCK, DEPTH):
                slot, phase = _load_step(
                    ring, slot, phase, sparse, dense, one, two, two < columns, place * BLOCK, within,
                    index * BLOCK + within, False, SPARSE_BY_DEPTH, DENSE_BY_DEPTH,
                )  # fmt: skip


@gluon.jit
def _consume_product(
    ring, buffers, out, order, offsets, rows, columns, WHICH: gl.constexpr,
    LEFT: gl.constexpr, SPARSE_BY_DEPTH: gl.constexpr, DENSE_BY_DEPTH: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    column_tiles = gl.cdiv(columns, 2 * BLOCK)
    tiles = rows * column_tiles
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    slot = 0
    phase = 0
    # Rows are looked up two tiles ahead: no product waits for that.
    position, column_tile = in_groups(pid, rows, column_tiles, GROUP)
    row = gl.load(order + position)
    begin, end = gl.load(offsets + row), gl.load(offsets + row + 1)
    position, column_tile_1 = in_groups(gl.minimum(pid + programs, tiles - 1), rows, column_tiles, GROUP)
    row_1 = gl.load(order + position)
    for tile in range(pid, tiles, programs):
        begin_1, end_1 = gl.load(offsets + row_1), gl.load(offsets + row_1 + 1)
        position, column_tile_2 = in_groups(gl.minimum(tile + 2 * programs, tiles - 1), rows, column_tiles, GROUP)
        row_2 = gl.load(order + position)
        steps = (end - begin) * (BLOCK // DEPTH)
        gl.assume(steps >= 0)  # Triton drops what a loop carries if it only bounds another loop
        column = column_tile * (2 * BLOCK) + WHICH * BLOCK
        if column < columns:
            acc, slot, phase = _multiply(ring, slot, phase, steps, WHICH, LEFT, SPARSE_BY_DEPTH, DENSE_BY_DEPTH)
            if LEFT:
                _store(buffers, acc, out, row * BLOCK, column)
            else:
                _store(buffers, acc, out, column, row * BLOCK)
        else:
            slot, phase = pass_over(ring, slot, phase, steps)
        row, begin, end, column_tile = row_1, begin_1, end_1, column_tile_1
        row_1, column_tile_1 = row_2, column_tile_2
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "columns", "between"])
def product_kernel(
    sparse, dense, out, counter, order, offsets, indices, places, rows, columns, between,
    LEFT: gl.constexpr, PLACED: gl.constexpr, SPARSE_BY_DEPTH: gl.constexpr, DENSE_BY_DEPTH: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out = sparse dense, or where the sparse matrix is not on the LEFT dense sparse; zeros where it has no blocks.

    Rows are those of blocks that the result keeps (the sparse matrix's columns, if not on the LEFT), taken in `order`,
    whose entries lie at `indices` and, where PLACED, have their values at `places`; columns are the dense operand's
    that it keeps. sparse: a descriptor of the blocks below one another, of half a block: [BLOCK, DEPTH], or BY_DEPTH
    [DEPTH, BLOCK]; dense likewise. counter: zero. between: tiles from one meeting to the next.
    """
    sparse_tiles = gl.allocate_shared_memory(sparse.dtype, [STAGES] + sparse.block_type.shape, sparse.layout)
    dense_tiles = gl.allocate_shared_memory(dense.dtype, [2 * STAGES] + dense.block_type.shape, dense.layout)
    mine = gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout)
    other = gl.allocate_shared_memory(out.dtype, [2] + out.block_type.shape, out.layout)
    ring = make_ring(sparse_tiles, dense_tiles, STAGES, False)
    gl.warp_specialize(
        [
            (_consume_product, (ring, mine, out, order, offsets, rows, columns, gl.constexpr(0), LEFT, SPARSE_BY_DEPTH,
                                DENSE_BY_DEPTH, GROUP)),
            (_consume_product, (ring, other, out, order, offsets, rows, columns, gl.constexpr(1), LEFT, SPARSE_BY_DEPTH,
                                DENSE_BY_DEPTH, GROUP)),
            (_produce_product, (ring, sparse, dense, counter, order, offsets, indices, places, rows, columns, between,
                                PLACED, SPARSE_BY_DEPTH, DENSE_BY_DEPTH, GROUP)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def _tiles(matrix: Tensor, by_depth: bool) -> object:
    return descriptor(matrix, [DEPTH.value, BLOCK.value] if by_depth else [BLOCK.value, DEPTH.value])


def sdd(values: Tensor, a: Tensor, a_turned: bool, b: Tensor, b_turned: bool, topology: Topology) -> None:
    """The product's blocks at the topology to values [Z, 128, 128]; inert ones are zero.

    a: [M, K], or a_turned [K, M]. b: [K, N], or b_turned [N, K]. Rows begin on 16 bytes.
    """
    left, depth = not topology.pairs_share_columns, a.shape[0 if a_turned else 1]
    one, other = _tiles(a, a_turned), _tiles(b, not b_turned)
    sdd_kernel[(programs(values.device, topology.pairs.shape[0]),)](
        one if left else other, other if left else one, _stored(values.view(-1, BLOCK.value)), _counter(values),
        topology.pairs, topology.row_indices, topology.column_indices, topology.pairs.shape[0],
        topology.shape[0] // BLOCK.value, depth, tiles_a_meeting(depth), SHARED_LEFT=left,
        SHARED_BY_DEPTH=a_turned if left else not b_turned, OWN_BY_DEPTH=not b_turned if left else a_turned,
        **OPTIONS,
    )  # fmt: skip


def product(
    out: Tensor, values: Tensor, dense: Tensor, dense_turned: bool, topology: Topology, transposed: bool, left: bool
) -> None:
    """The sparse matrix, or its transpose, times dense (dense times it, if not `left`) to out.

    dense: the right operand [K, N], the left one [M, K], or turned the transpose of that. Rows begin on 16 bytes.
    """
    by_columns = transposed == left  # the lists go through columns
    offsets, indices, order = topology.row_offsets, topology.column_indices, topology.row_order
    if by_columns:
        offsets, indices, order = topology.column_offsets, topology.row_indices_t, topology.column_order
    dense_by_depth = dense_turned != left
    rows, columns = order.shape[0], out.shape[1 if left else 0]
    between = tiles_a_meeting(topology.entries // rows * BLOCK.value)
    product_kernel[(programs(values.device, rows * triton.cdiv(columns, 2 * BLOCK.value)),)](
        _tiles(values.view(-1, BLOCK.value), by_columns), _tiles(dense, dense_by_depth), _stored(out), _counter(values),
        order, offsets, indices, topology.places_t, rows, columns, between,
        LEFT=left, PLACED=by_columns, SPARSE_BY_DEPTH=by_columns, DENSE_BY_DEPTH=dense_by_depth, GROUP=_GROUP,
        **OPTIONS,
    )  # fmt: skip


def _stored(matrix: Tensor) -> object:
    return descriptor(matrix, [BLOCK.value // 2, BLOCK.value // 2])


def _counter(like: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=like.device)
