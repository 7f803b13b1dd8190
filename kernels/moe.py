"""The mixture-of-experts layer without dropped or padded tokens: checks arguments and chooses the path.

A CUDA device runs the Triton kernels of `kernels.grouped`, behind two operators that torch.compile and CUDA graphs can
take whole; every other device runs `kernels.reference`. With TRITON_INTERPRET=1 a CPU runs the Triton code in Triton's
interpreter (float32 and float16: its bfloat16 products are wrong). Importing this module does not import Triton; the
first use does.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, N = T*K assignments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import GPU_DTYPES, use_triton
from kernels.routing import Routing, route


def dropless_moe(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    activation: str = "silu",
) -> Tensor:
    """Send every token through its K experts and add their outputs: sum over k of weight * (act(x w1^T) * (x v1^T)) w2.

    Differentiates through x_TD, expert_weight_TK, w1_EFD, v1_EFD and w2_EFD; deterministic; strided inputs are taken as
    they are. On a GPU nothing is copied to the host, forward or backward.

    Args:
        x_TD: [T, D] float32, float16 or bfloat16 (float64 too, except on a GPU); T may be 0.
        expert_index_TK: [T, K] int32 or int64 in [0, E), K <= E; LAKEMOE_DEBUG=1 checks the range.
        expert_weight_TK: [T, K] float32 or x's dtype.
        w1_EFD: [E, F, D] in x's dtype, the projection that is activated.
        v1_EFD: [E, F, D] in x's dtype, the gated linear projection, or None for no gate.
        w2_EFD: [E, F, D] in x's dtype, the projection back (DBRX's layout: the same shape as w1).
        activation: "silu", "gelu" (erf) or "gelu_tanh".

    Returns:
        [T, D] in x's dtype; products are accumulated in float32 at least.

    Raises:
        ValueError: an argument, which the message names, has a wrong device, dtype, shape or value.
    """
    _check(x_TD, expert_index_TK, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, activation)
    if not use_triton("x_TD", x_TD):
        return reference.dropless_moe(x_TD, expert_index_TK, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, activation)
    routing = route(expert_index_TK, w1_EFD.shape[0])
    y_TD, _, _ = _forward(x_TD, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, *routing, activation)
    return y_TD


def _check(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    activation: str,
) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, not {activation!r}")
    if x_TD.dim() != 2:
        raise ValueError(f"x_TD must have shape [T, D], not {list(x_TD.shape)}")
    if x_TD.dtype not in (*GPU_DTYPES, torch.float64):
        raise ValueError(f"x_TD must be float32, float16 or bfloat16, not {x_TD.dtype}")
    if w1_EFD.dim() != 3:
        raise ValueError(f"w1_EFD must have shape [E, F, D], not {list(w1_EFD.shape)}")
    T, D = x_TD.shape
    E, F, _ = w1_EFD.shape
    if min(D, E, F) < 1:
        raise ValueError(f"w1_EFD must have no empty dimension, but its shape is {list(w1_EFD.shape)}")
    K = expert_index_TK.shape[1] if expert_index_TK.dim() == 2 else 0
    if expert_index_TK.shape != (T, K) or K < 1:
        raise ValueError(f"expert_index_TK must have shape [T={T}, K], not {list(expert_index_TK.shape)}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "expert_weight_TK": (expert_weight_TK, (T, K)),
        "w1_EFD": (w1_EFD, (E, F, D)),
        "v1_EFD": (v1_EFD, (E, F, D)),
        "w2_EFD": (w2_EFD, (E, F, D)),
        "expert_index_TK": (expert_index_TK, (T, K)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.device != x_TD.device:
            raise ValueError(f"{name} is on {tensor.device}, but must be on x_TD's device {x_TD.device}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
        if name == "expert_index_TK":
            continue  # route() knows its dtypes
        if tensor.dtype != x_TD.dtype and not (name == "expert_weight_TK" and tensor.dtype == torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}, but must be in x_TD's dtype {x_TD.dtype}")


# The operators. They take a Routing's fields one by one, because an operator's arguments are tensors and numbers.


@torch.library.custom_op("lakemoe::moe_forward", mutates_args=())
def _forward(
    x_TD: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    order: Tensor,
    inverse: Tensor,
    token: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_count: Tensor,
    tile_rows: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [T, D] and the pre-activations h = x w1^T and u = x v1^T, [N, F] (u is empty without v1)."""
    from kernels import grouped

    routing = Routing(order, inverse, token, tokens_per_expert, offsets, tile_expert, tile_row, tile_count, tile_rows)
    return grouped.forward(x_TD, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, routing, activation)


@_forward.register_fake
def _(x_TD, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, order, *_):  # type: ignore[no-untyped-def]
    N, F = order.shape[0], w1_EFD.shape[1]
    u_NF = x_TD.new_empty(N if v1_EFD is not None else 0, F)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(N, F), u_NF


@torch.library.custom_op("lakemoe::moe_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    h_NF: Tensor,
    u_NF: Tensor,
    order: Tensor,
    inverse: Tensor,
    token: Tensor,
    tokens_per_expert: Tensor,
    offsets: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_count: Tensor,
    tile_rows: int,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, expert_weight, w1, v1 and w2; one that is not needed is an empty tensor."""
    from kernels import grouped

    routing = Routing(order, inverse, token, tokens_per_expert, offsets, tile_expert, tile_row, tile_count, tile_rows)
    return grouped.backward(
        dy_TD, x_TD, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, h_NF, u_NF, routing, activation, needs
    )


@_backward.register_fake
def _(dy_TD, x_TD, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, *rest):  # type: ignore[no-untyped-def]
    inputs = (x_TD, expert_weight_TK, w1_EFD, w1_EFD, w2_EFD)
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(inputs, rest[-1], strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TD, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, *routing, activation = inputs
    *tensors, tile_rows = routing
    _, h_NF, u_NF = output
    ctx.save_for_backward(x_TD, expert_weight_TK, w1_EFD, v1_EFD, w2_EFD, h_NF, u_NF, *tensors)
    ctx.tile_rows, ctx.activation = tile_rows, activation
    # Nobody differentiates the pre-activations: zeros of their size must not be made for them.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy_TD: Tensor | None, _dh: None, _du: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 10
    if dy_TD is None:
        return (*(None,) * 5, *rest)
    needs = list(ctx.needs_input_grad[:5])
    gradients = _backward(dy_TD, *ctx.saved_tensors, ctx.tile_rows, ctx.activation, needs)
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *rest)


_forward.register_autograd(_differentiate, setup_context=_save)
