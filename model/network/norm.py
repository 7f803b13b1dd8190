"""Normalisation: LayerNorm without bias and RMSNorm, computed in float32 and returned in the input's dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.Module):
    """x [..., width] -> the same shape and dtype, times a learned weight [width].

    layer_norm: (x - mean) / sqrt(var + eps); rms_norm: x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019).
    """

    def __init__(self, kind: Literal["layer_norm", "rms_norm"], width: int, eps: float) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.weight.shape[0],)
        if self.kind == "layer_norm":
            y = F.layer_norm(x.float(), shape, self.weight.float(), None, self.eps)
        else:
            y = F.rms_norm(x.float(), shape, self.weight.float(), self.eps)
        return y.to(x.dtype)
