"""Products with block-sparse matrices, over any topology: sdd, dsd and dds, for any transposition, with gradients.

    sdd    dense x dense, sampled at a topology    s = (a b) at the topology's blocks
    dsd    sparse x dense                          y = s b
    dds    dense x sparse                          y = a s

Each one's gradients are the other two, so that they differentiate through every operand, twice if need be. Names and
meaning are MegaBlocks' (Gale et al. 2022). Transposed views cost nothing: of dense operands they are read as they lie,
of sparse ones `t()` moves no value.

A CUDA device runs the Triton kernels of `kernels.sparse_products`, behind operators that torch.compile and CUDA graphs
can take whole; every other device runs `kernels.reference`. With TRITON_INTERPRET=1 a CPU runs the Triton code in
Triton's interpreter (float32 and float16). Importing this module does not import Triton; the first use does.

Legend: R rows of blocks, C columns of blocks, Z entries of the topology; of a product M rows, N columns, K summed over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import GPU_DTYPES, use_triton
from kernels.topology import Topology


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """A matrix that is zero outside a topology's blocks."""

    values: Tensor
    """[Z, block, block] in the topology's row-major order; what inert entries hold has no meaning and is never read."""
    topology: Topology
    """Where the values lie before any transposition."""
    transposed: bool = False
    """Whether the matrix is the transpose of what values and topology say."""

    def __post_init__(self) -> None:
        block, entries = self.topology.block, self.topology.entries
        if self.values.shape != (entries, block, block):
            expected = f"[Z={entries}, block={block}, block={block}]"
            raise ValueError(f"values must have shape {expected}, not {list(self.values.shape)}")
        _check_topology("values", self.values, self.topology)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, in elements."""
        rows, columns = self.topology.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def t(self) -> BlockSparse:
        """The transpose, a view: it shares the values."""
        return replace(self, transposed=not self.transposed)

    def to_dense(self) -> Tensor:
        """The matrix with its zeros, in memory of its own; differentiable, and without waiting for the device."""
        place_Z, _, (R, C) = _places(self.topology)
        block = self.topology.block
        # One place more than the matrix has takes what inert entries hold.
        blocks = self.values.new_zeros(R * C + 1, block, block).index_copy(0, place_Z, self.values)[: R * C]
        dense = blocks.view(R, C, block, block).transpose(1, 2).reshape(self.topology.shape)
        return dense.t().contiguous() if self.transposed else dense

    @classmethod
    def from_dense(cls, dense: Tensor, topology: Topology) -> BlockSparse:
        """The matrix's blocks at the topology; what lies outside is dropped. Differentiable.

        Raises:
            ValueError: dense has another shape or device than the topology.
        """
        if tuple(dense.shape) != topology.shape:
            raise ValueError(f"dense must have the topology's shape {list(topology.shape)}, not {list(dense.shape)}")
        _check_topology("dense", dense, topology)
        place_Z, inert_Z, (R, C) = _places(topology)
        block = topology.block
        blocks = dense.reshape(R, block, C, block).transpose(1, 2).reshape(R * C, block, block)
        values = blocks.index_select(0, place_Z.masked_fill(inert_Z, 0)) if R * C else blocks
        return cls(values.masked_fill(inert_Z.view(-1, 1, 1), 0), topology)


def _places(topology: Topology) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(each entry's place r*C + c, R*C where inert; which entries are inert; R and C)."""
    R, C = (side // topology.block for side in topology.shape)
    inert_Z = topology.row_indices == R
    place_Z = topology.row_indices.long() * C + topology.column_indices
    return place_Z.masked_fill(inert_Z, R * C), inert_Z, (R, C)


def sdd(a_MK: Tensor, b_KN: Tensor, topology: Topology) -> BlockSparse:
    """The blocks at the topology of the product a b; no other is computed.

    Args:
        a_MK: [M, K] float32, float16 or bfloat16 (float64 too, except on a GPU), with any strides.
        b_KN: [K, N] in a's dtype, with any strides.
        topology: of shape [M, N].

    Raises:
        ValueError: an argument, which the message names, has a wrong device, dtype or shape.
    """
    M, N = topology.shape
    _check_dense("a_MK", a_MK, M, None)
    _check_dense("b_KN", b_KN, a_MK.shape[1], N)
    if b_KN.dtype != a_MK.dtype:
        raise ValueError(f"b_KN is {b_KN.dtype}, but must be in a_MK's dtype {a_MK.dtype}")
    _check_topology("a_MK", a_MK, topology)
    _check_topology("b_KN", b_KN, topology)
    if use_triton("a_MK", a_MK):
        return BlockSparse(_sdd(a_MK, b_KN, *topology.tensors, topology.block), topology)
    return BlockSparse(reference.sdd(a_MK, b_KN, topology), topology)


def dsd(s: BlockSparse, b_KN: Tensor) -> Tensor:
    """The product s b, [M, N], of a sparse [M, K] and a dense [K, N] of the same dtype, with any strides.

    Raises:
        ValueError: an argument, which the message names, has a wrong device, dtype or shape.
    """
    _check_operands(s, "b_KN", b_KN, s.shape[1], None)
    if use_triton("s", s.values):
        return _product(s.values, b_KN, *s.topology.tensors, s.topology.block, s.transposed, True)
    return reference.dsd(s.values, b_KN, s.topology, s.transposed)


def dds(a_MK: Tensor, s: BlockSparse) -> Tensor:
    """The product a s, [M, N], of a dense [M, K], with any strides, and a sparse [K, N] of the same dtype.

    Raises:
        ValueError: an argument, which the message names, has a wrong device, dtype or shape.
    """
    _check_operands(s, "a_MK", a_MK, None, s.shape[0])
    if use_triton("s", s.values):
        return _product(s.values, a_MK, *s.topology.tensors, s.topology.block, s.transposed, False)
    return reference.dds(a_MK, s.values, s.topology, s.transposed)


def _check_dense(name: str, matrix: Tensor, rows: int | None, columns: int | None) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"{name} must be a matrix, but its shape is {list(matrix.shape)}")
    if matrix.dtype not in (*GPU_DTYPES, torch.float64):
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {matrix.dtype}")
    for dimension, (found, expected) in enumerate(zip(matrix.shape, (rows, columns), strict=True)):
        if expected is not None and found != expected:
            what = ("rows", "columns")[dimension]
            raise ValueError(f"{name} must have {expected} {what} to fit the other operand, not {found}")


def _check_topology(name: str, tensor: Tensor, topology: Topology) -> None:
    device = topology.row_offsets.device
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on the topology's device {device}")


def _check_operands(s: BlockSparse, name: str, dense: Tensor, rows: int | None, columns: int | None) -> None:
    _check_dense(name, dense, rows, columns)
    if dense.dtype != s.values.dtype:
        raise ValueError(f"{name} is {dense.dtype}, but must be in s's dtype {s.values.dtype}")
    _check_topology(name, dense, s.topology)


# The operators. They take a Topology's tensors one by one, because an operator's arguments are tensors and numbers.


def _topology(tensors: tuple[Tensor, ...], block: int) -> Topology:
    rows, columns = (tensors[n].shape[0] - 1 for n in (0, 3))
    return Topology(block, (rows * block, columns * block), *tensors)


@torch.library.custom_op("lakemoe::block_sparse_sdd", mutates_args=())
def _sdd(
    a_MK: Tensor,
    b_KN: Tensor,
    row_offsets: Tensor,
    column_indices: Tensor,
    row_indices: Tensor,
    column_offsets: Tensor,
    row_indices_t: Tensor,
    places_t: Tensor,
    walk: Tensor,
    pairs: Tensor,
    row_order: Tensor,
    column_order: Tensor,
    block: int,
) -> Tensor:
    """Return the values [Z, block, block]."""
    from kernels import sparse_products

    tensors = (
        row_offsets, column_indices, row_indices, column_offsets, row_indices_t, places_t, walk, pairs, row_order,
        column_order,
    )  # fmt: skip
    return sparse_products.sdd(a_MK, b_KN, _topology(tensors, block))


@_sdd.register_fake
def _(a_MK, b_KN, row_offsets, column_indices, *rest):  # type: ignore[no-untyped-def]
    return a_MK.new_empty(column_indices.shape[0], rest[-1], rest[-1])


@torch.library.custom_op("lakemoe::block_sparse_product", mutates_args=())
def _product(
    values: Tensor,
    dense: Tensor,
    row_offsets: Tensor,
    column_indices: Tensor,
    row_indices: Tensor,
    column_offsets: Tensor,
    row_indices_t: Tensor,
    places_t: Tensor,
    walk: Tensor,
    pairs: Tensor,
    row_order: Tensor,
    column_order: Tensor,
    block: int,
    transposed: bool,
    left: bool,
) -> Tensor:
    """Return s dense where the sparse matrix is on the `left`, else dense s; s is the transpose if `transposed`."""
    from kernels import sparse_products

    tensors = (
        row_offsets, column_indices, row_indices, column_offsets, row_indices_t, places_t, walk, pairs, row_order,
        column_order,
    )  # fmt: skip
    topology = _topology(tensors, block)
    if left:
        return sparse_products.dsd(values, dense, topology, transposed)
    return sparse_products.dds(dense, values, topology, transposed)


@_product.register_fake
def _(values, dense, row_offsets, column_indices, row_indices, column_offsets, *rest):  # type: ignore[no-untyped-def]
    *_, block, transposed, left = rest
    # s is [rows, columns], and of its two sides the one that meets nothing is the result's.
    rows, columns = ((offsets.shape[0] - 1) * block for offsets in (row_offsets, column_offsets))
    if left:
        return dense.new_empty(columns if transposed else rows, dense.shape[1])
    return dense.new_empty(dense.shape[0], rows if transposed else columns)


def _save_sdd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_sdd(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    a_MK, b_KN, *tensors = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad[:2]
    # da = ds b^T, db = a^T ds
    da_MK = _product(dvalues, b_KN.t(), *tensors, ctx.block, False, True) if needs_a else None
    db_KN = _product(dvalues, a_MK.t(), *tensors, ctx.block, False, False) if needs_b else None
    return (da_MK, db_KN, *(None,) * 11)


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block, ctx.transposed, ctx.left = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_product(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    values, dense, *tensors = ctx.saved_tensors
    needs_values, needs_dense = ctx.needs_input_grad[:2]
    dvalues = ddense = None
    if needs_values:
        # y = s b: ds = dy b^T. y = a s: ds = a^T dy. If s is the transpose of what is stored, so is its gradient.
        first, second = (dout, dense.t()) if ctx.left else (dense.t(), dout)
        if ctx.transposed:
            first, second = second.t(), first.t()
        dvalues = _sdd(first, second, *tensors, ctx.block)
    if needs_dense:  # y = s b: db = s^T dy. y = a s: da = dy s^T
        ddense = _product(values, dout, *tensors, ctx.block, not ctx.transposed, ctx.left)
    return (dvalues, ddense, *(None,) * 13)


_sdd.register_autograd(_differentiate_sdd, setup_context=_save_sdd)
_product.register_autograd(_differentiate_product, setup_context=_save_product)
