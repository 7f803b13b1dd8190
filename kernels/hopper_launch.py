"""What all launches of the kernels for Hopper share: descriptors, programs, and how often these meet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.hopper import DEPTH, MEET
from kernels.portable import multiprocessors

# STAGES: slots of the ring, as many as shared memory holds beside the tiles that leave it. maxnreg: registers of a
# thread before the roles share them out; those of 3 warpgroups fill a multiprocessor.
OPTIONS = {"STAGES": 4, "num_warps": 4, "maxnreg": 168}


def descriptor(t: Tensor, block: list[int], shape: list[int] | None = None, strides: list[int] | None = None) -> Any:
    """Of tiles that lie in shared memory as the tensor cores read them."""
    width = min(128, block[-1] * t.element_size())
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(t, shape or list(t.shape), strides or list(t.stride()), block, layout)


def programs(device: torch.device, tiles: int) -> int:
    """As many as there are tiles at most, and as can all run at once: they meet."""
    return max(1, min(tiles, multiprocessors(device)))


def tiles_a_meeting(depth: int) -> int:
    """How many tiles of that depth, on average, programs compute from one meeting to the next."""
    return max(1, 2 * MEET.value * DEPTH.value // max(1, depth))
