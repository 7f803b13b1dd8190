"""The mixture-of-experts layer: a router that chooses experts for each token, and the experts, none of them dropping.

The experts may lie on several ranks (model/network/expert_parallel.py); which, model/train/parallel.py decides.
Legend: T tokens, D width, E experts, K chosen, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.moe import dropless_moe
from model.config import ModelConfig
from model.network.router import Router, RouterSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MoE(nn.Module):
    """x [T, D] -> (the same shape, the router's sums). Weights in DBRX's layout: w1, v1, w2 [E, F, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        shape = (config.experts, config.expert_width, config.width)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.v1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))
        # The ranks that share the experts among them; None: all are here.
        self.expert_group: ProcessGroup | None = None
        self.expert_chunks = 1

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, RouterSums]:
        routing, sums = self.router(x_TD, valid_T)
        return self.experts(x_TD, routing.expert_index_TK, routing.expert_weight_TK), sums

    def experts(self, x_TD: Tensor, expert_index_TK: Tensor, expert_weight_TK: Tensor) -> Tensor:
        """The experts' weighted outputs, [T, D]."""
        weights = (self.w1, self.v1, self.w2)
        if self.expert_group is None:
            return dropless_moe(x_TD, expert_index_TK, expert_weight_TK, *weights, activation=self.config.activation)
        from model.network.expert_parallel import expert_parallel_moe

        how = (self.config.activation, self.expert_group, self.expert_chunks)
        return expert_parallel_moe(x_TD, expert_index_TK, expert_weight_TK, *weights, *how)
