"""The peers of dropless training: a mixture of experts with a capacity, which drops tokens, and a dense layer.

With a capacity each expert takes C = ceil(factor * T * K / E) tokens of a batch (Fedus et al. 2021, Switch, eq. 3):
where it got fewer it is padded, what it got beyond is dropped and goes on by the residual alone. First choices come
before second ones, earlier tokens before later ones (GShard). The experts are three batched products over [E, C, D]. It
is written to be fast: the sort is our own three kernels, both ways between tokens and slots are gathers, forward and
backward, and nothing waits for the device. The group in which capacity counts is the whole batch, as large as it can
be, so that as few as can be are dropped.

Legend: T tokens, D width, E experts, K chosen, F expert width, C capacity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.reference import ACTIVATIONS
from kernels.routing import route
from model.config import ModelConfig
from model.network.moe import MoE
from model.network.router import RouterSums


def capacity_of(factor: float, tokens: int, chosen: int, experts: int) -> int:
    """Tokens that an expert takes."""
    return math.ceil(factor * tokens * chosen / experts)


class _ToSlots(torch.autograd.Function):
    """x [T, D] -> [E * C, D]: each slot's token; the gradient is a gather, too: a token has at most K slots."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_S: Tensor, slot_KT: Tensor, kept_KT: Tensor) -> Tensor:
        ctx.save_for_backward(slot_KT, kept_KT)
        return x_TD.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        slot_KT, kept_KT = ctx.saved_tensors
        grad_KTD = grads[0][slot_KT] * kept_KT[:, :, None]
        return grad_KTD.sum(dim=0), None, None, None


class _FromSlots(torch.autograd.Function):
    """y [E * C, D] -> [K, T, D], zero where the token was dropped; the gradient of a slot that holds none is zero."""

    @staticmethod
    def forward(
        ctx: Any, y_SD: Tensor, slot_KT: Tensor, kept_KT: Tensor, assignment_S: Tensor, used_S: Tensor
    ) -> Tensor:
        ctx.save_for_backward(assignment_S, used_S)
        return y_SD[slot_KT] * kept_KT[:, :, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        assignment_S, used_S = ctx.saved_tensors
        grad_SD = grads[0].flatten(0, 1).index_select(0, assignment_S) * used_S[:, None]
        return grad_SD, None, None, None, None


def capacity_moe(
    x_TD: Tensor,
    expert_index_TK: Tensor,
    expert_weight_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor,
    w2_EFD: Tensor,
    factor: float,
    activation: str = "silu",
) -> Tensor:
    """kernels.moe.dropless_moe with a capacity: what is beyond it adds nothing to its token, the rest is the same."""
    (T, K), E = expert_index_TK.shape, w1_EFD.shape[0]
    capacity = capacity_of(factor, T, K, E)
    index_KT = expert_index_TK.t()
    # One choice after the other, each by token: the sort is stable, so this order is an expert's queue.
    routing = route(index_KT.reshape(-1, 1), E)
    begin_E, end_E = routing.offsets[:-1], routing.offsets[1:]
    place_KT = routing.inverse.view(K, T) - begin_E[index_KT]
    kept_KT = place_KT < capacity
    slot_KT = index_KT * capacity + place_KT.clamp(max=capacity - 1)
    sorted_EC = begin_E[:, None] + torch.arange(capacity, device=x_TD.device, dtype=torch.int32)
    used_S = (sorted_EC < end_E[:, None]).flatten()
    assignment_S = routing.order[sorted_EC.clamp(max=T * K - 1)].flatten()

    x_ECD = _ToSlots.apply(x_TD, assignment_S % T, slot_KT, kept_KT).view(E, capacity, -1)
    a_ECF = ACTIVATIONS[activation](torch.bmm(x_ECD, w1_EFD.transpose(1, 2)))
    a_ECF = a_ECF * torch.bmm(x_ECD, v1_EFD.transpose(1, 2))
    y_SD = torch.bmm(a_ECF, w2_EFD).flatten(0, 1)
    y_KTD = _FromSlots.apply(y_SD, slot_KT, kept_KT, assignment_S, used_S)
    y_TD: Tensor = (y_KTD.float() * expert_weight_TK.t()[:, :, None]).sum(dim=0)
    return y_TD.to(x_TD.dtype)


class CapacityMoE(MoE):
    """MoE with a capacity; its router, weights and state_dict are the same. Without ``dropping`` it is MoE."""

    def __init__(self, config: ModelConfig, factor: float) -> None:
        super().__init__(config)
        self.factor = factor
        self.dropping = True

    def experts(self, x_TD: Tensor, expert_index_TK: Tensor, expert_weight_TK: Tensor) -> Tensor:
        if not self.dropping:
            return super().experts(x_TD, expert_index_TK, expert_weight_TK)
        weights = (self.w1, self.v1, self.w2)
        return capacity_moe(x_TD, expert_index_TK, expert_weight_TK, *weights, self.factor, self.config.activation)


class Dense(nn.Module):
    """One gated layer of the configuration's expert width, for every token, without a router."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.expert_width, config.width)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.v1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, RouterSums]:
        a = ACTIVATIONS[self.config.activation](F.linear(x, self.w1)) * F.linear(x, self.v1)
        assignments_E = torch.full((1,), x.shape[:-1].numel(), device=x.device)
        zero = torch.zeros((), device=x.device)
        return F.linear(a, self.w2.t()), RouterSums(assignments_E, zero[None], zero)
