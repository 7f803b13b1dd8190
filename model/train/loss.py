"""Cross-entropy without the logits of a whole batch.

The loss and both gradients are computed chunk by chunk in the forward pass, so that at most ``chunk`` rows of float32
logits exist at a time and none of them is computed twice.

Legend: N targets, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, target_N: Tensor, chunk: int) -> Tensor:
        device = h_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
        with torch.autocast(device, enabled=False):
            h, w = h_ND.to(dtype), w_VD.to(dtype)
            loss = torch.zeros((), dtype=torch.float32, device=h.device)
            dh, dw = torch.empty_like(h), torch.zeros_like(w_VD, dtype=torch.float32)
            for start in range(0, len(h), chunk):
                part = slice(start, start + chunk)
                logits = (h[part] @ w.T).float()
                log_z = logits.logsumexp(dim=-1, keepdim=True)
                at = target_N[part, None]
                loss += (log_z - logits.gather(1, at)).sum()
                # d loss / d logits = softmax - one-hot
                grad = logits.sub_(log_z).exp_()
                grad.scatter_add_(1, at, torch.full_like(at, -1, dtype=grad.dtype))
                grad = grad.to(dtype)
                torch.mm(grad, w, out=dh[part])
                dw += grad.T @ h[part]
        ctx.save_for_backward(dh.to(h_ND.dtype), dw.to(w_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dh, dw = ctx.saved_tensors
        return grads[0] * dh, grads[0] * dw, None, None


def cross_entropy_sum(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, chunk: int = 1024) -> Tensor:
    """Sum over N of -log softmax(h w^T)[target], float32 scalar in nats; differentiable in h and w.

    Products are in autocast's dtype where it is on, the softmax always in float32.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(h_ND, w_VD, target_N, chunk)
    return loss


@torch.no_grad()
def token_losses(h_ND: Tensor, w_VD: Tensor, target_N: Tensor, chunk: int = 1024) -> Tensor:
    """-log softmax(h w^T)[target] of each target, float32 [N] in nats, without gradient."""
    parts = []
    for start in range(0, len(h_ND), chunk):
        part = slice(start, start + chunk)
        logits = (h_ND[part] @ w_VD.to(h_ND.dtype).T).float()
        parts.append(logits.logsumexp(dim=-1) - logits.gather(1, target_N[part, None])[:, 0])
    return torch.cat(parts) if parts else torch.zeros(0, device=h_ND.device)
