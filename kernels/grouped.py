"""The dropless mixture of experts on a GPU: which products run, in which order, on which memory.

    forward    h = x[tok] w1^T,  u = x[tok] v1^T,  a = act(h) * u,  out = a w2,  y_t = sum_k weight_tk out[inverse_tk]
    backward   g = dy[tok] w2^T,  dweight = <g, a>,  da = weight g,  dh = da u act'(h),  du = da act(h)
               dx_t = sum_k (dh w1 + du v1)[inverse_tk]
               dw1 = dh^T x[tok],  dv1 = du^T x[tok],  dw2 = (weight a)^T dy[tok]

Data movement: forward is two products and a sum. The first reads the tokens' rows, by pointers or from a sorted copy,
and leaves h, u and a; the second leaves one row an assignment, which the sum weighs and adds up token by token.
Backward is four products, a pass between the first and the others that makes a again from h and u, and a sum; only x,
h, u and the routing are kept for it. No sum is made by atomics: each has a fixed order.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import hopper
from kernels.portable import Portable, describable
from kernels.routing import Routing
from kernels.tiles import tiles


def _layer(x_TD: Tensor, weight_TK: Tensor, w1_EFD: Tensor, gated: bool, routing: Routing) -> Portable:
    """The layer's products on this device: Hopper's own, or those of any GPU."""
    E, F, D = w1_EFD.shape
    top_k, busy = weight_TK.shape[1], min(weight_TK.numel(), E)
    sizes = tiles(D, F, routing.tile_rows, x_TD.element_size(), gated, busy)
    if hopper(x_TD) and routing.tile_rows == 128 and min(D, F) >= 64:  # full tiles
        from kernels.hopper_layer import Hopper

        return Hopper(routing, top_k, sizes, x_TD.device)
    return Portable(routing, top_k, sizes)


def forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    routing: Routing,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D], h = x w1^T and u = x v1^T (both [N, F] in sorted order; u is empty without v1)."""
    layer = _layer(x_TD, weight_TK, w1_EFD, v1_EFD is not None, routing)
    x, w1, w2 = describable(x_TD), describable(w1_EFD), describable(w2_EFD)
    v1 = None if v1_EFD is None else describable(v1_EFD)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        h, u, a = layer.up(layer.tokens(x), w1, v1, activation)
        rows = layer.down(a, w2)
        del a
        y = layer.combined(rows, weight_TK.contiguous())
    return y, h, x.new_empty(0, h.shape[1]) if u is None else u


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    h_NF: Tensor,
    u_NF: Tensor,
    routing: Routing,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, w1, v1, w2; `needs` says which, the others are empty tensors."""
    layer = _layer(x_TD, weight_TK, w1_EFD, v1_EFD is not None, routing)
    E = w1_EFD.shape[0]
    none = x_TD.new_empty(0)
    w1, w2 = describable(w1_EFD), describable(w2_EFD)
    v1 = None if v1_EFD is None else describable(v1_EFD)
    with torch.cuda.device_of(x_TD):
        dy = layer.tokens(describable(dy_TD))
        dhu, wa, dweight = layer.through(dy, w2, h_NF, None if v1 is None else u_NF, weight_TK.contiguous(), activation)
        dw1 = dv1 = dw2 = dx = none
        if needs[4]:
            dw2 = layer.to_down(wa, dy, E)
        del wa, dy
        wanted = [half for half in range(dhu.shape[0]) if needs[2 + half]]
        if wanted:
            left = dhu if len(wanted) == dhu.shape[0] else dhu[wanted[0] : wanted[0] + 1]
            found = dict(zip(wanted, layer.to_up(left, layer.tokens(describable(x_TD)), E), strict=True))
            dw1, dv1 = found.get(0, none), found.get(1, none)
        if needs[0]:
            dx = layer.combined(layer.to_x(dhu, w1, v1), None)
    return dx, dweight if needs[1] else dweight.new_empty(0), dw1, dv1, dw2
