"""The mixture of experts in plain PyTorch: the specification, the CPU's path and the tests' truth.

    y_t = sum over k of weight_tk * (act(x_t w1_e^T) * (x_t v1_e^T)) w2_e,   e = expert_index_tk

Rows are sorted by expert, each expert multiplies its own slice, and outputs return to their tokens by a gather through
the inverse permutation. Any floating dtype, also float64; ordinary autograd. It reads the experts' loads on the host,
which is free on a CPU and a synchronisation on a GPU (where `kernels.moe` does not use it). Arguments are not checked.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.routing import route

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
