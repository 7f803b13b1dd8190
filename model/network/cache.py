"""The keys and values of what a model has read, so that the next token costs one token's work.

One slot a sequence, each as long as the capacity. Leaves out paging and sharing of slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values [layers, slots, kv_heads, capacity, head_width]; every slot holds ``length`` tokens.

    Errors: ValueError where more is written than the capacity holds.
    """

    def __init__(
        self, config: ModelConfig, slots: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.layers, slots, config.kv_heads, capacity, config.head_width)
        # Zeros, not empty: a masked slot still enters the product with the values, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.slots = slots
        self.capacity = capacity
        self.length = 0

    def write(self, layer: int, k_BMSH: Tensor, v_BMSH: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the new keys and values after those that are there; returns all of the layer's [B, M, capacity, H]."""
        end = self.length + k_BMSH.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache: {end} tokens do not fit its capacity of {self.capacity}")
        self.keys[layer, :, :, self.length : end] = k_BMSH
        self.values[layer, :, :, self.length : end] = v_BMSH
        return self.keys[layer], self.values[layer]

    def advance(self, tokens: int) -> None:
        """Called once all layers have written ``tokens`` tokens."""
        self.length += tokens
