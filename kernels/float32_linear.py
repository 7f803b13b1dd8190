"""x W^T to float32's precision for bfloat16 x, on tensor cores.

A float32 number (24 bits of significand) is the sum of three bfloat16 numbers (8 bits each):

    W = W1 + W2 + W3                y = x W1^T + x W2^T + x W3^T      one product with [3E, D], then a sum of three
    G = G1 + G2 + G3 (dy)           dW = G1^T x + G2^T x + G3^T x     likewise
    dx = G1 W1 + G2 W1 + G1 W2      one product of depth 3E: 16 bits and more, of which bfloat16 keeps 8

Two bfloat16 numbers' product is exact in float32, so only the sums round (Henry et al. 2019), which tensor cores do to
a bit or three less than float32: the error is 2e-6 to 3e-6 of the largest result over 2,048 products (D, or T for dW)
and 4e-6 over 16,384, of a plain product on CUDA cores 3e-7 and 6e-7, of a TF32 one 2e-4. For routers (few outputs,
whose rounding flips choices), where a plain one takes five times as long. Other devices and dtypes run the plain one.

Legend: T tokens, D width, E outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def float32_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """[T, E] float32. weight_ED: float32. The gradients are in the dtypes of what they belong to."""
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16:
        return F.linear(x_TD.float(), weight_ED.float())
    found: Tensor = _Float32Linear.apply(x_TD, weight_ED)
    return found


def in_three(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 tensors whose sum is the float32 one, the largest first.

    Cut off by bits and not rounded by a cast: compiled, a cast to bfloat16 and back is left out (Inductor keeps fused
    values in float32), and the second and third parts would be zero.
    """
    first = _upper(x)
    rest = x - first
    second = _upper(rest)
    return first.to(torch.bfloat16), second.to(torch.bfloat16), (rest - second).to(torch.bfloat16)


def _upper(x: Tensor) -> Tensor:
    """float32 with the 16 bits that bfloat16 has, the others zero."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        y = torch.mm(x_TD, torch.cat(in_three(weight_ED)).T, out_dtype=torch.float32)
        return y.unflatten(1, (3, -1)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        g1, g2, g3 = in_three(grads[0])
        w1, w2, _ = in_three(weight_ED)
        dx = torch.mm(torch.cat((g1, g2, g1), 1), torch.cat((w1, w1, w2)))
        dw = torch.mm(torch.cat((g1, g2, g3), 1).T, x_TD, out_dtype=torch.float32)
        return dx, dw.unflatten(0, (3, -1)).sum(0)
