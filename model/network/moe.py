"""The mixture-of-experts layer: a router that chooses experts for each token, and the experts, none of them dropping.

Leaves out expert parallelism, and balancing by anything but the auxiliary loss.
Legend: T tokens, D width, E experts, K chosen, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.moe import dropless_moe
from model.config import ModelConfig


class Routing(NamedTuple):
    """expert_index_TK int64, expert_weight_TK float32, aux_loss (scalar), load_E: fractions of the assignments."""

    expert_index_TK: Tensor
    expert_weight_TK: Tensor
    aux_loss: Tensor
    load_E: Tensor


def balance_loss(probability_TE: Tensor, load_E: Tensor, valid_T: Tensor | None) -> Tensor:
    """E * sum over e of load_e * mean probability_e; 1 when balanced, at most E (Fedus et al. 2021, Switch, eq. 4).

    load_E are fractions of all T * K assignments, so that the value does not grow with K. transformers'
    ``load_balancing_loss_func`` sums the fractions over the K choices: for one layer, its value is K times this one.
    """
    if valid_T is None:
        mean_E = probability_TE.mean(dim=0)
    else:
        mean_E = (probability_TE * valid_T[:, None]).sum(dim=0) / valid_T.sum().clamp(min=1)
    return load_E.numel() * (load_E * mean_E).sum()


def choose(logits_TE: Tensor, chosen: int, normalize: str, valid_T: Tensor | None = None) -> Routing:
    """Softmax over all experts in float32, the K most probable, their weights made to sum to one (l1) or as they are.

    Tokens that are not ``valid_T`` (padding) are routed like any other and count neither in the loss nor in the load.
    """
    probability_TE = logits_TE.float().softmax(dim=-1)
    weight_TK, index_TK = probability_TE.topk(chosen, dim=-1)
    if normalize == "l1":
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    counted = torch.ones_like(index_TK, dtype=torch.float32)
    if valid_T is not None:
        counted = counted * valid_T[:, None]
    experts = probability_TE.shape[1]
    # A sum over a one-hot and not bincount or index_add: those are atomics on a GPU and give other bits each time.
    load_E = (F.one_hot(index_TK, experts) * counted[..., None]).sum(dim=(0, 1)) / counted.sum().clamp(min=1)
    return Routing(index_TK, weight_TK, balance_loss(probability_TE, load_E, valid_T), load_E)


class MoE(nn.Module):
    """x [..., D] -> (the same shape, aux_loss scalar, load [E]). Weights in DBRX's layout: w1, v1, w2 [E, F, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.width, config.experts, bias=False)
        shape = (config.experts, config.expert_width, config.width)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.v1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = x.reshape(-1, x.shape[-1])
        device = x.device.type
        # The router stays in float32 under autocast: rounding its logits flips choices (ST-MoE, Zoph et al. 2022).
        with torch.autocast(device, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.router.weight.float())
            routing = choose(logits_TE, self.config.experts_chosen, self.config.router_normalize, valid_T)
        weights = (self.w1, self.v1, self.w2)
        # Autocast does not know our operator, so its casts are made here.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.w1.dtype
        w1, v1, w2 = (w.to(dtype) for w in weights)
        y_TD = dropless_moe(
            x_TD.to(dtype),
            routing.expert_index_TK,
            routing.expert_weight_TK,
            w1,
            v1,
            w2,
            activation=self.config.activation,
        )
        return y_TD.view(x.shape), routing.aux_loss, routing.load_E
