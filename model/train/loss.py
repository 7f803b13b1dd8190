"""Cross-entropy without the logits of a whole batch.

The loss and both gradients are computed chunk by chunk in the forward pass, so that at most ``chunk`` rows of logits
exist at a time and none of them is computed twice. On a GPU each chunk is three products and one compiled kernel, which
reads the logits twice and writes their gradient once.

Legend: N targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

NO_TARGET = -1
F = TypeVar("F", bound=Callable[..., Any])


def _loss_and_gradient(logits_NV: Tensor, target_N: Tensor, z_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: -log softmax [N], log of the sum of exponentials squared [N], and d loss / d logits [N, V]."""
    logits = logits_NV.float()
    log_z = logits.logsumexp(dim=-1, keepdim=True)
    counted = (target_N != NO_TARGET)[:, None]
    at = target_N.clamp(min=0)[:, None]
    loss_N = torch.where(counted, log_z - logits.gather(1, at), 0.0)[:, 0]
    z_N = torch.where(counted, log_z.square(), 0.0)[:, 0]
    # d loss / d logits = softmax - one-hot; d log_z^2 / d logits = 2 log_z softmax
    softmax = (logits - log_z).exp() * (1 + 2 * z_weight * log_z)
    one_hot = torch.arange(logits.shape[1], device=logits.device) == at
    gradient = torch.where(counted, softmax - one_hot.to(softmax.dtype), 0.0).to(logits_NV.dtype)
    return loss_N, z_N, gradient


def _scale_(x: Tensor, factor: Tensor) -> Tensor:
    """In place. To be compiled: torch's own product with a scalar on the device is not vectorised."""
    return x.mul_(factor)


@cache
def _compiled(function: F) -> F:
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, w_VD: Tensor, target_N: Tensor, chunk: int, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = _compiled(_loss_and_gradient) if h_ND.is_cuda else _loss_and_gradient
        loss_N, z_N = torch.empty((2, len(h_ND)), dtype=torch.float32, device=h_ND.device)
        dh = torch.empty_like(h_ND)
        dw = torch.zeros_like(w_VD, dtype=torch.float32)
        for start in range(0, len(h_ND), chunk):
            part = slice(start, start + chunk)
            loss_N[part], z_N[part], gradient = with_gradient(h_ND[part] @ w_VD.T, target_N[part], z_weight)
            torch.mm(gradient, w_VD, out=dh[part])
            _add_product(dw, gradient.T, h_ND[part])
        ctx.save_for_backward(dh, dw.to(w_VD.dtype))
        ctx.mark_non_differentiable(loss_N, z_N)
        return loss_N.sum() + z_weight * z_N.sum(), loss_N, z_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dh, dw = ctx.saved_tensors
        # In place: they are read once, and at a large vocabulary dw is a gigabyte.
        scale = _compiled(_scale_) if dh.is_cuda else _scale_
        return scale(dh, grads[0]), scale(dw, grads[0]), None, None, None


def _add_product(sum_VD: Tensor, a_VN: Tensor, b_ND: Tensor) -> None:
    """sum += a b in float32, also where a and b are bfloat16."""
    if a_VN.is_cuda and a_VN.dtype != torch.float32:
        torch.addmm(sum_VD, a_VN, b_ND, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD.add_(a_VN @ b_ND)


class CrossEntropy(NamedTuple):
    """total: float32 scalar in nats, differentiable. Without gradient, a value a target: loss_N and z_N, its square
    of log(sum of exp(logits)). Both are zero where there is no target."""

    total: Tensor
    loss_N: Tensor
    z_N: Tensor


def cross_entropy_sum(
    h_ND: Tensor, w_VD: Tensor, target_N: Tensor, chunk: int = 1024, z_weight: float = 0.0
) -> CrossEntropy:
    """Sum over N of -log softmax(h w^T)[target] + z_weight * log(sum of exp(h w^T))^2; differentiable in h and w.

    A target of NO_TARGET counts nothing. Products are in h's and w's dtype, the softmax in float32. The z-loss is
    PaLM's (Chowdhery et al. 2022, section 5).
    """
    return CrossEntropy(*_ChunkedCrossEntropy.apply(h_ND, w_VD, target_N, chunk, z_weight))


@torch.no_grad()
def token_losses(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, chunk: int = 1024) -> Tensor:
    """-log softmax(h w^T)[target] of each target, float32 [N] in nats, without gradient."""
    parts = []
    for start in range(0, len(h_ND), chunk):
        part = slice(start, start + chunk)
        logits = (h_ND[part] @ w_VD.to(h_ND.dtype).T).float()
        parts.append(logits.logsumexp(dim=-1) - logits.gather(1, target_N[part, None])[:, 0])
    return torch.cat(parts) if parts else torch.zeros(0, device=h_ND.device)
