"""Which code an operand runs on, Triton's or the reference's: the one rule of all kernels.

A CUDA device runs Triton. With TRITON_INTERPRET=1 a CPU runs the Triton code in Triton's interpreter, whose bfloat16
products are wrong. Everything else is the reference's.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton's code runs in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(name: str, tensor: Tensor) -> bool:
    """Whether Triton's code takes this operand. Raises ValueError, with its name, for a dtype that no GPU code has."""
    if tensor.is_cuda:
        if tensor.dtype not in GPU_DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16 on a GPU, not {tensor.dtype}")
        return True
    return interpreted() and tensor.dtype in (torch.float32, torch.float16)


def hopper(tensor: Tensor) -> bool:
    """Whether there are kernels written for the tensor's device, a Hopper GPU, and its dtype of 16 bits."""
    if not tensor.is_cuda or tensor.element_size() != 2 or torch.version.hip is not None:
        return False  # a ROCm device may have that capability, too
    return torch.cuda.get_device_capability(tensor.device) == (9, 0) and _gluon()


@cache
def _gluon() -> bool:
    """Whether this Triton's Gluon, which is experimental and changes, has what kernels/hopper.py is written in."""
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= (major, minor) <= (3, 9)  # both ends were tried


_left = 0


def leave_multiprocessors(count: int) -> None:
    """Let products take so many multiprocessors less, in this process from now on.

    For kernels that run beside them, such as NCCL's: a product is made by as many programs as there are
    multiprocessors, each of which has its share of it, so that one that finds its multiprocessor taken makes all wait
    twice as long.
    """
    global _left
    _left = count


def left_multiprocessors() -> int:
    """How many are left to others."""
    return _left


def precision() -> str:
    """How Triton multiplies float32, as torch is set: "tf32" or "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
