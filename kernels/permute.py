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

from kernels.backend import use_triton
from kernels.routing import Routing


def permute(x_TD: Tensor, routing: Routing) -> Tensor:
    """[N, D], each token's row once for each of its assignments, sorted as ``routing`` (kernels/routing.py) says."""
    found: Tensor = _Permute.apply(x_TD, routing)
    return found


def unpermute(rows_ND: Tensor, routing: Routing, top_k: int) -> Tensor:
    """[N / top_k, D], in rows' dtype."""
    found: Tensor = _Unpermute.apply(rows_ND, routing, top_k)
    return found


def _copies(x_TD: Tensor, routing: Routing) -> Tensor:
    if not use_triton("x_TD", x_TD):
        return x_TD.index_select(0, routing.token)
    from kernels.portable import sorted_copy

    with torch.cuda.device_of(x_TD):  # Triton launches on the current device
        return sorted_copy(x_TD if x_TD.stride(-1) == 1 else x_TD.contiguous(), routing)


def _sums(rows_ND: Tensor, routing: Routing, top_k: int) -> Tensor:
    if not use_triton("rows_ND", rows_ND):
        rows_TKD = rows_ND.index_select(0, routing.inverse).unflatten(0, (-1, top_k))
        return rows_TKD.sum(1, dtype=torch.promote_types(torch.float32, rows_ND.dtype)).to(rows_ND.dtype)
    from kernels.portable import combined

    with torch.cuda.device_of(rows_ND):
        return combined(rows_ND.contiguous(), None, routing, top_k)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, routing: Routing) -> Tensor:
        ctx.routing, ctx.top_k = routing, routing.order.shape[0] // max(1, x_TD.shape[0])
        ctx.shape = x_TD.shape
        return _copies(x_TD, routing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sums(grads[0], ctx.routing, max(1, ctx.top_k)).view(ctx.shape), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, routing: Routing, top_k: int) -> Tensor:
        ctx.routing = routing
        return _sums(rows_ND, routing, top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _copies(grads[0], ctx.routing), None, None
