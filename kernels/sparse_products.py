"""The block-sparse products on a GPU: sdd, and one kernel for dsd and dds, in Triton.

    sdd        s[r, c] = sum over k of a[r, k] b[k, c]            for every entry (r, c) of the topology
    product    out[r, n] = sum over row r's entries (r, c) of s[r, c] x[c, n]

dsd is `product`. dds is `product` of the transposes, (x s)^T = s^T x^T, whose tile is turned before it is stored. A
product with s^T goes through the topology's column-major list and turns each block on its way in; a dense operand that
is a transposed view is read as it lies and turned likewise. So two kernels do every product, every transposition and
every gradient, and they share one loop, which differs only in where a step's two tiles are.

Data movement: tiles stream through shared memory by TMA descriptors (pointers, where the hardware has no TMA). One
program makes one tile of the result, in registers, and stores it once: no atomics, every sum in the same order. sdd
makes one block a program, walking so that neighbours share rows and columns in L2; product's programs go in groups of
rows for the same reason. The depth of sdd's loop is K; of product's, all blocks of a row, one after the other: rows of
many blocks take longer, and the hardware gives the next tile to whichever multiprocessor is free.

On a Hopper GPU blocks of 128 in 16 bits take the kernels of `kernels.hopper_sparse` instead.

Long float32 sums are made in runs of eight steps, since one long float32 sum rounds by its length.

Legend: R rows of blocks, C columns of blocks, Z entries; of a product M rows, N columns and K summed over.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives meaning to a kernel's annotations: a parameter without one is a run-time value.
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import hopper, precision
from kernels.topology import Topology


@triton.jit
def _load(matrix, row, column, TURNED: tl.constexpr):
    """A tile at (row, column), of a matrix whose descriptor holds it, or its transpose where TURNED."""
    # A return within the branch would make Triton type the other one too, whose tile has another shape.
    tile = matrix.load([column, row]).T if TURNED else matrix.load([row, column])
    return tile


@triton.jit
def _accumulate(
    left, right, indices, places, row, column, begin, steps,
    SPARSE: tl.constexpr, PLACED: tl.constexpr, LEFT_TURNED: tl.constexpr, RIGHT_TURNED: tl.constexpr,
    PRECISION: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The tile sum over k of left[row, k] right[k, column], BK of k a step.

    Dense: k runs through 0 to K. SPARSE: k runs through the columns that the entries from `begin` on have, and left is
    a pile of blocks, in which an entry's block is at places[entry] where PLACED, else at the entry's own number.
    """
    acc = tl.zeros((BLOCK, BN), tl.float32)
    run = tl.zeros((BLOCK, BN), tl.float32)
    # The next step's entry is looked up a step ahead, so that its tiles are never waited for in a row of two loads.
    index = 0
    place = begin
    if SPARSE:
        index = tl.load(indices + begin, steps > 0, other=0)
        if PLACED:
            place = tl.load(places + begin, steps > 0, other=0)
    for step in range(steps):
        k = step * BK
        left_row = row
        left_k = k
        if SPARSE:
            within = k % BLOCK
            left_row = 0 if LEFT_TURNED else place * BLOCK
            left_k = place * BLOCK + within if LEFT_TURNED else within
            k = index * BLOCK + within
            entry = begin + (step + 1) * BK // BLOCK
            index = tl.load(indices + entry, step + 1 < steps, other=0)
            place = entry
            if PLACED:
                place = tl.load(places + entry, step + 1 < steps, other=0)
        left_tile = _load(left, left_row, left_k, LEFT_TURNED)
        right_tile = _load(right, k, column, RIGHT_TURNED)
        acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
        if RUNS:
            full = step % 8 == 7
            run += tl.where(full, acc, 0.0)
            acc = tl.where(full, 0.0, acc)
    if RUNS:
        acc += run
    return acc


@triton.jit(do_not_specialize=["row_end", "K"])
def sdd_kernel(
    a, b, values, row_indices, column_indices, walk, row_end, K,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    PRECISION: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """values[entry] = the product's block there; zeros in an inert entry."""
    entry = tl.load(walk + tl.program_id(0))
    row = tl.load(row_indices + entry)
    column = tl.load(column_indices + entry)
    steps = tl.where(row < row_end, tl.cdiv(K, BK), 0)
    acc = _accumulate(
        a, b, row_indices, row_indices, row * BLOCK, column * BLOCK, 0, steps,
        False, False, A_TURNED, B_TURNED, PRECISION, RUNS, BLOCK, BLOCK, BK,
    )  # fmt: skip
    values.store([entry * BLOCK, 0], acc.to(values.dtype))


@triton.jit(do_not_specialize=["rows", "columns"])
def product_kernel(
    left, right, out, offsets, indices, places, rows, columns,
    PLACED: tl.constexpr, LEFT_TURNED: tl.constexpr, RIGHT_TURNED: tl.constexpr, OUT_TURNED: tl.constexpr,
    PRECISION: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One row of blocks times BN columns; zeros for a row without blocks."""
    # GROUP rows walk through the columns together, so that they share these in L2.
    pid = tl.program_id(0)
    size = GROUP * tl.cdiv(columns, BN)
    first = (pid // size) * GROUP
    height = tl.minimum(rows - first, GROUP)
    row = first + (pid % size) % height
    column = ((pid % size) // height) * BN
    begin = tl.load(offsets + row)
    steps = (tl.load(offsets + row + 1) - begin) * (BLOCK // BK)
    acc = _accumulate(
        left, right, indices, places, 0, column, begin, steps,
        True, PLACED, LEFT_TURNED, RIGHT_TURNED, PRECISION, RUNS, BLOCK, BN, BK,
    )  # fmt: skip
    tile = acc.to(out.dtype)
    if OUT_TURNED:
        out.store([column, row * BLOCK], tile.T)
    else:
        out.store([row * BLOCK, column], tile)


@dataclass(frozen=True)
class Tile:
    """columns of the result (sdd's are a block's), `depth` summed over in a step; of one program's warps and stages."""

    columns: int
    depth: int
    warps: int
    stages: int


# For blocks of 128 in two bytes, where kernels/hopper_sparse.py does not have them. Two programs fit one
# multiprocessor: one stores while the other multiplies.
TILES = {"sdd": Tile(128, 64, 4, 3), "product": Tile(128, 64, 4, 3)}
# By the registers that they need: entries of four bytes as tf32, entries of four bytes without tensor cores, and
# entries of two bytes where there is no TMA.
_WIDE, _EXACT, _BEFORE_HOPPER = Tile(64, 32, 8, 2), Tile(64, 16, 8, 2), Tile(128, 32, 8, 3)
_GROUP = 8


def sdd(a_MK: Tensor, b_KN: Tensor, topology: Topology) -> Tensor:
    """The product's blocks at the topology, [Z, block, block]; inert ones are zero."""
    block, K = topology.block, a_MK.shape[1]
    values = a_MK.new_empty(topology.entries, block, block)
    if values.numel() == 0 or K == 0:
        return values.zero_()
    (a_MK, a_turned), (b_KN, b_turned) = _stored(a_MK), _stored(b_KN)
    if hopper(values) and block == 128:
        from kernels import hopper_sparse

        with torch.cuda.device_of(values):  # Triton launches on the current device
            hopper_sparse.sdd(values, a_MK, a_turned, b_KN, b_turned, topology)
        return values
    tile = _fit("sdd", block, block, a_MK)
    a, b = _describe(a_MK, a_turned, block, tile.depth), _describe(b_KN, b_turned, tile.depth, block)
    with torch.cuda.device_of(a_MK):
        sdd_kernel[(topology.entries,)](
            a, b, _blocks(values, block, block), topology.row_indices, topology.column_indices, topology.walk,
            topology.shape[0] // block, K, A_TURNED=a_turned, B_TURNED=b_turned, **_numerics(a_MK),
            BLOCK=block, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return values


def dsd(values: Tensor, dense_KN: Tensor, topology: Topology, transposed: bool = False) -> Tensor:
    """The sparse matrix, or its transpose, times the dense one."""
    return _product(values, dense_KN, topology, transposed, left=True)


def dds(dense_MK: Tensor, values: Tensor, topology: Topology, transposed: bool = False) -> Tensor:
    """The dense matrix times the sparse one, or its transpose."""
    return _product(values, dense_MK, topology, transposed, left=False)


def _product(values: Tensor, dense: Tensor, topology: Topology, transposed: bool, left: bool) -> Tensor:
    """The sparse matrix, or its transpose, times dense; dense times it, if it is not on the `left`."""
    block = topology.block
    kept = topology.shape[1 if transposed == left else 0]  # of the sparse matrix's sides, the one that the result has
    out = _pitched(values, (kept, dense.shape[1]) if left else (dense.shape[0], kept))
    if out.numel() == 0 or values.numel() == 0:
        return out.zero_().contiguous()
    values = values.contiguous()
    if values.data_ptr() % 16:  # a descriptor begins on 16 bytes
        values = values.clone()
    dense, turned = _stored(dense)
    with torch.cuda.device_of(values):  # Triton launches on the current device
        if hopper(values) and block == 128:
            from kernels import hopper_sparse

            hopper_sparse.product(out, values, dense, turned, topology, transposed, left)
        else:
            # dds is the product of the transposes.
            _portable_product(out, values, dense, turned == left, topology, transposed == left, turned=not left)
    return out.contiguous()


def _portable_product(
    out: Tensor, values: Tensor, right: Tensor, right_turned: bool, topology: Topology, transposed: bool, turned: bool
) -> None:
    """The sparse matrix, or its transpose, times `right` to out; to out's transpose where `turned`."""
    block, (rows, N) = topology.block, out.t().shape if turned else out.shape
    offsets, indices = topology.row_offsets, topology.column_indices
    if transposed:
        offsets, indices = topology.column_offsets, topology.row_indices_t
    tile = _fit("product", block, N, values)
    product_kernel[(rows // block * triton.cdiv(N, tile.columns),)](
        _blocks(values, tile.depth, block) if transposed else _blocks(values, block, tile.depth),
        _describe(right, right_turned, tile.depth, tile.columns),
        TensorDescriptor.from_tensor(out, [tile.columns, block] if turned else [block, tile.columns]),
        offsets, indices, topology.places_t, rows // block, N,
        PLACED=transposed, LEFT_TURNED=transposed, RIGHT_TURNED=right_turned, OUT_TURNED=turned,
        **_numerics(values), BLOCK=block, BN=tile.columns, BK=tile.depth, GROUP=_GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _fit(product: str, block: int, columns: int, like: Tensor) -> Tile:
    """The product's tile, no larger than the product."""
    tile = TILES[product]
    if like.element_size() == 4:
        tile = _WIDE if _numerics(like)["PRECISION"] == "tf32" else _EXACT
    elif like.is_cuda and torch.cuda.get_device_capability(like.device)[0] < 9:
        tile = _BEFORE_HOPPER
    return Tile(
        columns=min(tile.columns, max(16, triton.next_power_of_2(columns))),
        depth=min(tile.depth, block),
        warps=tile.warps if block >= 64 else 4,
        stages=tile.stages,
    )


def _numerics(like: Tensor) -> dict[str, object]:
    return {"PRECISION": precision(), "RUNS": like.dtype == torch.float32}


def _blocks(values: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The blocks below one another, read or written [rows, columns] at a time."""
    return TensorDescriptor.from_tensor(values.view(-1, values.shape[2]), [rows, columns])


def _describe(matrix: Tensor, turned: bool, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of tiles [rows, columns], of a matrix or, where `turned`, of its transpose."""
    return TensorDescriptor.from_tensor(matrix, [columns, rows] if turned else [rows, columns])


def _stored(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix or its transpose, as a descriptor can say how it lies, and whether it is the transpose.

    A matrix that lies otherwise (neither side without gaps, or not on 16 bytes) is copied.
    """
    if _describable(matrix):
        return matrix, False
    if _describable(matrix.t()):
        return matrix.t(), True
    return _pitched(matrix, (matrix.shape[0], matrix.shape[1])).copy_(matrix), False


def _describable(matrix: Tensor) -> bool:
    pitch, step = matrix.stride()
    return (
        step == 1
        and pitch >= matrix.shape[1]
        and pitch * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def _pitched(like: Tensor, shape: tuple[int, int]) -> Tensor:
    """An empty matrix whose rows begin on 16 bytes."""
    unit = 16 // like.element_size()
    return like.new_empty(shape[0], -(-shape[1] // unit) * unit)[:, : shape[1]]
