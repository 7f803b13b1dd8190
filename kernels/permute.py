"""Rows of tokens to the order of their experts and back: for experts that lie elsewhere (expert parallelism).

    permute      rows[inverse[t, k]] = x[t]           a token's row to each of its K places among the sorted rows
    unpermute    y[t] = sum over k of rows[inverse[t, k]]      added up in float32, in the order of k

Each is the other's gradient, so nothing but the routing is kept for backward, no sum is made by atomics, and both ways
cost one pass over the rows. (Megatron-LM and Transformer Engine call them so.) A GPU runs the copies and sums of the
layer itself (kernels/portable.py), every other device torch's.

Legend: T tokens, D width, K chosen experts a token, N = T*K rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton


def permute(x_TD: Tensor, inverse_N: Tensor) -> Tensor:
    """[N, D], each token's row once for each of its assignments.

    inverse_N: int32, the place among the sorted rows of each assignment, t * K + k (kernels/routing.py); K is N / T, so
    that rows of assignments (T = N) are permuted alike.
    """
    found: Tensor = _Permute.apply(x_TD, inverse_N)
    return found


def unpermute(rows_ND: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """[N / top_k, D], in rows' dtype."""
    found: Tensor = _Unpermute.apply(rows_ND, inverse_N, top_k)
    return found


def _copies(x_TD: Tensor, inverse_N: Tensor) -> Tensor:
    N = inverse_N.shape[0]
    if not use_triton("x_TD", x_TD):
        rows_ND = x_TD.new_empty(N, x_TD.shape[1])
        return rows_ND.index_copy_(0, inverse_N.long(), x_TD.repeat_interleave(N // max(1, x_TD.shape[0]), dim=0))
    from kernels.portable import sorted_copy

    with torch.cuda.device_of(x_TD):  # Triton launches on the current device
        return sorted_copy(x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous(), inverse_N)


def _sums(rows_ND: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    if not use_triton("rows_ND", rows_ND):
        rows_TKD = rows_ND.index_select(0, inverse_N).unflatten(0, (-1, top_k))
        return rows_TKD.sum(1, dtype=torch.promote_types(torch.float32, rows_ND.dtype)).to(rows_ND.dtype)
    from kernels.portable import combined

    with torch.cuda.device_of(rows_ND):
        return combined(rows_ND.contiguous(), None, inverse_N, top_k)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = max(1, inverse_N.shape[0] // max(1, x_TD.shape[0]))
        return _copies(x_TD, inverse_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse_N,) = ctx.saved_tensors
        return _sums(grads[0], inverse_N, ctx.top_k), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return _sums(rows_ND, inverse_N, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return _copies(grads[0], inverse_N), None, None
