"""The mixture of experts and the block-sparse products in plain PyTorch: the specification, the CPU's path.

    y_t = sum over k of weight_tk * (act(x_t w1_e^T) * (x_t v1_e^T)) w2_e,   e = expert_index_tk

Rows are sorted by expert, each expert multiplies its own slice, and outputs return to their tokens by a gather through
the inverse permutation. The block-sparse products go through the sparse matrix by rows of blocks, each of which is one
dense product with the rows or columns that it meets.

Any floating dtype, also float64; ordinary autograd. It reads experts' loads and rows' lengths on the host, which is
free on a CPU and a synchronisation on a GPU (where the kernels do not use it). Arguments are not checked.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments; of a product
of matrices M rows, N columns and K summed over; Z entries of a topology.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.routing import route
from kernels.topology import Topology

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def dropless_moe(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    activation: str = "silu",
) -> Tensor:
    """Compute what `kernels.moe.dropless_moe` computes, which documents arguments and result."""
    T, K = expert_index_TK.shape
    act = ACTIVATIONS[activation]
    routing = route(expert_index_TK, w1_EFD.shape[0])
    loads: list[int] = routing.tokens_per_expert.tolist()
    if sum(loads) != T * K:
        raise ValueError(f"expert_index_TK holds an expert outside 0 to {w1_EFD.shape[0] - 1}")

    # unbind and split have one backward for all experts; indexing in the loop would add up E full-size gradients.
    x_ND = _GatherTokens.apply(x_TD, routing.order, routing.inverse, K)
    w1s, v1s, w2s = w1_EFD.unbind(0), None if v1_EFD is None else v1_EFD.unbind(0), w2_EFD.unbind(0)
    outputs = []
    for e, x_nD in enumerate(x_ND.split(loads)):
        # Without any token the empty products keep the result on the graph, so that backward yields zeros.
        if loads[e] or T == 0:
            a_nF = act(x_nD @ w1s[e].t())
            if v1s is not None:
                a_nF = a_nF * (x_nD @ v1s[e].t())
            outputs.append(a_nF @ w2s[e])
    out_TKD = _Permute.apply(torch.cat(outputs), routing.inverse, routing.order).view(T, K, x_TD.shape[1])
    wide = torch.promote_types(torch.float32, x_TD.dtype)
    return (out_TKD.to(wide) * expert_weight_TK.to(wide).unsqueeze(-1)).sum(1).to(x_TD.dtype)


class _Permute(torch.autograd.Function):
    """Rows by a permutation; the gradient is the inverse gather, where index_select's own is a slow index_add."""

    @staticmethod
    def forward(ctx, rows, index, inverse):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        index, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, index), None, None


class _GatherTokens(torch.autograd.Function):
    """The token of each sorted assignment; the gradient gathers back and sums over K in a fixed order."""

    @staticmethod
    def forward(ctx, x_TD, order, inverse, K):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order, inverse)
        ctx.shape = (x_TD.shape[0], K, x_TD.shape[1])
        return x_TD.index_select(0, order // K)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order).view(ctx.shape).sum(1), None, None, None


def sdd(a_MK: Tensor, b_KN: Tensor, topology: Topology) -> Tensor:
    """The product's blocks at the topology, [Z, block, block]; inert ones are zero."""
    block, K = topology.block, a_MK.shape[1]
    b_KCb = b_KN.reshape(K, b_KN.shape[1] // block, block)
    columns = topology.column_indices.long().split(_counts(topology.row_offsets, topology.entries))
    # Without any row the empty product keeps the result on the graph, so that backward yields zeros.
    blocks = [(a_MK[:0] @ b_KN).view(-1)[:0].view(0, block, block)]
    for a_bK, column in zip(a_MK.reshape(a_MK.shape[0] // block, block, K), columns[:-1], strict=True):
        # One row of blocks times the columns that it has.
        row_bn = a_bK @ b_KCb.index_select(1, column).flatten(1)
        blocks.append(row_bn.view(block, len(column), block).transpose(0, 1))
    return torch.cat([*blocks, a_MK.new_zeros(len(columns[-1]), block, block)])


def dsd(values: Tensor, dense_KN: Tensor, topology: Topology, transposed: bool = False) -> Tensor:
    """The sparse matrix, or its transpose, times the dense one; a block that is not stored multiplies nothing."""
    block, N = topology.block, dense_KN.shape[1]
    offsets, indices = topology.row_offsets, topology.column_indices
    if transposed:
        offsets, indices = topology.column_offsets, topology.row_indices_t
        values = values.index_select(0, topology.places_t.long()).transpose(1, 2)
    counts = _counts(offsets, topology.entries)
    dense_RbN = dense_KN.reshape(dense_KN.shape[0] // block, block, N)
    out = [dense_KN[:0] * values.reshape(-1)[:0].sum()]
    for row, index in zip(values.split(counts)[:-1], indices.long().split(counts)[:-1], strict=True):
        out.append(row.transpose(0, 1).flatten(1) @ dense_RbN.index_select(0, index).flatten(0, 1))
    return torch.cat(out)


def dds(dense_MK: Tensor, values: Tensor, topology: Topology, transposed: bool = False) -> Tensor:
    """The dense matrix times the sparse one, or its transpose."""
    return dsd(values, dense_MK.t(), topology, not transposed).t()


def _counts(offsets: Tensor, entries: int) -> list[int]:
    """How many entries each row (or column) of blocks has, and last how many are inert."""
    begins: list[int] = offsets.tolist()
    return [end - begin for begin, end in zip(begins, [*begins[1:], entries], strict=True)]
