"""The Triton kernel of kernels/adamw.py, whose docstring has the mathematics: one pass over the five arrays.

Bound by memory: 14 bytes read and 12 written a weight (10 and 8 with
bfloat16 moments), no reuse; blocks of 2,048 weights are loaded and stored once.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit(do_not_specialize=["keep", "step_size", "root"])
def adamw_kernel(
    w_ptr, r_ptr, a_ptr, b_ptr, g_ptr, scale_ptr, n, keep, step_size, root, beta1, beta2, eps, BLOCK: tl.constexpr
):  # fmt: skip
    # int64: a model's experts are more than 2^31 weights
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    high = tl.load(w_ptr + at, inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    low = tl.load(r_ptr + at, inside, other=0).to(tl.int32)
    master = ((high << 16) + low).to(tl.float32, bitcast=True)
    g = tl.load(g_ptr + at, inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    a = tl.load(a_ptr + at, inside, other=0.0).to(tl.float32) * beta1 + (1 - beta1) * g
    b = tl.load(b_ptr + at, inside, other=0.0).to(tl.float32) * beta2 + (1 - beta2) * g * g
    master = master * keep - step_size * (a / (tl.sqrt(b) * root + eps))
    bits = master.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16
    tl.store(w_ptr + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), inside)
    tl.store(r_ptr + at, (bits - (high << 16)).to(tl.int16), inside)
    tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), inside)
    tl.store(b_ptr + at, b.to(b_ptr.dtype.element_ty), inside)


def launch(
    weight: Tensor,
    remainder: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    gradient_scale: Tensor,
    keep: float,
    step_size: float,
    root: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One update in place; arguments checked by kernels.adamw."""
    n = weight.numel()
    with torch.cuda.device(weight.device):
        adamw_kernel[(triton.cdiv(n, _BLOCK),)](
            weight, remainder, exp_avg, exp_avg_sq, gradient, gradient_scale,
            n, keep, step_size, root, beta1, beta2, eps, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
