"""AdamW for bfloat16 weights that keep all of float32: the missing bits lie beside the weight.

A float32 master weight m is held as two halves of its bits: w, the bfloat16 nearest to it, which the model computes
with, and r, an int16 remainder, so that bits(m) = 2^16 * bits(w) + r. Nothing is rounded away, and no float32 copy is
kept or cast: a step reads w, r, the bfloat16 gradient g and both moments a, b once and writes all but g once, 26 bytes
a weight (a float32 master beside a bfloat16 copy takes 30, torch's AdamW with a cast of weights and gradients 40).

    g' = scale * g;   a = beta1 a + (1 - beta1) g';   b = beta2 b + (1 - beta2) g'^2
    m = (1 - lr * decay) m - lr / (1 - beta1^t) * a / (sqrt(b / (1 - beta2^t)) + eps)

Loshchilov and Hutter 2019, algorithm 2, in float32. Halves of ties round up in size, so that r always fits: the nearest
even value would need r = 2^15. A CUDA device runs one Triton kernel, every other device the same in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton


def split_float32(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 of any shape -> its bfloat16 and int16 halves, of the same shape. ValueError for another dtype."""
    if master.dtype != torch.float32:
        raise ValueError(f"master must be float32, not {master.dtype}")
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_float32(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that split_float32 was given. ValueError for other dtypes than bfloat16 and int16."""
    if (weight.dtype, remainder.dtype) != (torch.bfloat16, torch.int16):
        raise ValueError(f"weight and remainder must be bfloat16 and int16, not {weight.dtype} and {remainder.dtype}")
    high = weight.contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder.to(torch.int32)).view(torch.float32)


@torch.no_grad()
def adamw_step(
    weight: Tensor,
    remainder: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    gradient_scale: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One update in place of weight, remainder and both moments.

    Args:
        weight, remainder: bfloat16 and int16, contiguous, the halves of split_float32.
        exp_avg, exp_avg_sq: float32 or bfloat16, contiguous, of weight's shape. In bfloat16, 18 bytes a weight are
            moved, and beta2 must be at most 0.98: less of a change than a 256th would be rounded away.
        gradient: bfloat16 or float32, of weight's shape; read only.
        gradient_scale: float32 scalar on weight's device that the gradient is multiplied by (clipping, without a pass
            of its own and without the host knowing it).
        step: this update's number, 1 for the first.

    Raises:
        ValueError: a tensor, which the message names, has a wrong dtype or shape or is not contiguous.
    """
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    wanted = {"weight": torch.bfloat16, "remainder": torch.int16}
    for name, tensor in {"weight": weight, "remainder": remainder, "gradient": gradient, **moments}.items():
        dtype = wanted.get(name) or (torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32)
        if tensor.dtype != dtype or tensor.shape != weight.shape:
            raise ValueError(f"{name} must be {dtype} {list(weight.shape)}, not {tensor.dtype} {list(tensor.shape)}")
        if name != "gradient" and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    gradient = gradient.contiguous()
    step_size = lr / (1 - beta1**step)
    # sqrt(b / c) = sqrt(b) / sqrt(c)
    root = (1 - beta2**step) ** -0.5
    keep = 1 - lr * weight_decay
    if use_triton("weight", weight):
        from kernels.adamw_kernel import launch

        launch(
            weight, remainder, exp_avg, exp_avg_sq, gradient, gradient_scale, keep, step_size, root, beta1, beta2, eps
        )
        return
    master = join_float32(weight, remainder)
    g = gradient.float() * gradient_scale
    a = exp_avg.float().mul(beta1).add_(g, alpha=1 - beta1)
    b = exp_avg_sq.float().mul(beta2).addcmul_(g, g, value=1 - beta2)
    master.mul_(keep).addcdiv_(a, (b.sqrt() * root).add_(eps), value=-step_size)
    exp_avg.copy_(a)
    exp_avg_sq.copy_(b)
    high, low = split_float32(master)
    weight.copy_(high)
    remainder.copy_(low)
