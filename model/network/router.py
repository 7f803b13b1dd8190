"""The router: which experts each token is sent to, with what weights, and what keeps the experts' loads even.

    p = softmax(x W^T)  or  sigmoid(x W^T)        the K experts with the largest p + bias; weights p, as they are or l1

Four ways to balance, each a field of the configuration, each by itself or with others:

- auxiliary loss: E * sum of load times mean probability (Fedus et al. 2021, Switch, eq. 4);
- z-loss: mean of log(sum of exp(logit))^2, so that logits stay small (Zoph et al. 2022, ST-MoE, eq. 5);
- bias without loss: b_e moves by rate * sign(mean load - load_e) once an optimizer step and enters the choice alone
  (Wang et al. 2024; DeepSeek-V3, section 2.1.2). It is state of the layer, in state_dict and no parameter;
- jitter: the router's input times uniform noise of 1 - j to 1 + j, in training alone (Switch, section 2.2).

A forward pass has no side effects, so one that runs twice (activation checkpointing) counts once: it returns sums over
its valid tokens, which add up over micro-batches and ranks. Whoever trains makes the losses of them (``router_losses``)
and, with the whole step's assignments, moves the biases (``move_biases``) and says how even the load is
(``load_metrics``).

Determinism: the same inputs give the same bits on one kind of device; assignments are integers, so that sums over
ranks, and by them the biases, depend on no order. Jitter draws from torch's random state: exact after a resume, equal
in the recomputation of activation checkpointing, but other noise for another number of ranks and in compiled code.
The auxiliary loss multiplies load by probability: with each micro-batch's own load it depends on how a step is cut.

Leaves out the experts (model/network/moe.py).
Legend: T tokens, D width, E experts, K chosen, L layers.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kernels.float32_linear import float32_linear
from model.config import ModelConfig


class Routing(NamedTuple):
    """expert_index_TK int64; expert_weight_TK float32; probability_TE float32, scores that sum to one a token."""

    expert_index_TK: Tensor
    expert_weight_TK: Tensor
    probability_TE: Tensor


class RouterSums(NamedTuple):
    """Sums over the valid tokens of one forward pass, of one layer or, with an axis L before all, of all layers."""

    assignments: Tensor
    """[E] int64, tokens an expert."""
    probability: Tensor
    """[E] float32, differentiable."""
    z: Tensor
    """[] float32, of log(sum of exp(logit))^2, differentiable; zero where the configuration has no z-loss."""


class RouterLosses(NamedTuple):
    """Scalars, means over layers: balance (1 when even, at most E) and z, both before their weights."""

    balance: Tensor
    z: Tensor


def choose(
    logits_TE: Tensor,
    chosen: int,
    normalize: Literal["l1", "none"],
    score: Literal["softmax", "sigmoid"] = "softmax",
    bias_E: Tensor | None = None,
) -> Routing:
    """Scores in float32, the K experts with the largest score + bias, weights from the scores alone.

    Softmax over all experts, top-k, l1 is the same as top-k and then softmax over the chosen (Mixtral's paper).
    Sigmoid scores become probabilities for the auxiliary loss by l1 over all experts (DeepSeek-V3, eq. 19).
    """
    logits_TE = logits_TE.float()
    if score == "softmax":
        score_TE = probability_TE = logits_TE.softmax(dim=-1)
    else:
        score_TE = logits_TE.sigmoid()
        probability_TE = _l1(score_TE)
    if bias_E is None:
        weight_TK, index_TK = score_TE.topk(chosen, dim=-1)
    else:
        index_TK = (score_TE.detach() + bias_E.float()).topk(chosen, dim=-1).indices
        weight_TK = score_TE.gather(1, index_TK)
    if normalize == "l1":
        weight_TK = _l1(weight_TK)
    return Routing(index_TK, weight_TK, probability_TE)


def _l1(score: Tensor) -> Tensor:
    # Sigmoids, and softmax scores that only their bias chose, can all be zero in float32; then so are their weights.
    return score / score.sum(dim=-1, keepdim=True).clamp(min=1e-20)


def count_assignments(expert_index_TK: Tensor, experts: int, valid_T: Tensor | None = None) -> Tensor:
    """How many valid tokens each expert was chosen for, int64 [E].

    A comparison and an integer sum: exact in any order, where bincount and index_add are atomics on a GPU and a one-hot
    is eight bytes an entry. torch.compile fuses both, and otherwise the comparison is one byte an entry of [T, K, E].
    """
    is_chosen_TKE = expert_index_TK[:, :, None] == torch.arange(experts, device=expert_index_TK.device)
    if valid_T is not None:
        is_chosen_TKE = is_chosen_TKE & valid_T[:, None, None]
    return is_chosen_TKE.sum(dim=(0, 1))


def _sum_valid(values: Tensor, valid_T: Tensor | None) -> Tensor:
    """Over tokens, the first axis."""
    if valid_T is not None:
        # Not a product with 0: what padding computes to need not be finite.
        values = values.where(valid_T.view(-1, *[1] * (values.dim() - 1)), 0.0)
    return values.sum(dim=0)


def router_losses(
    sums: RouterSums, chosen: int, *, assignments: Tensor | None = None, tokens: Tensor | int | None = None
) -> RouterLosses:
    """The losses of one forward pass.

    Args:
        sums: of a layer or of all.
        chosen: K.
        assignments: the load that the auxiliary loss multiplies with, where it is not the pass's own: the sum over
            ranks makes the losses of all ranks add up to what one rank has that sees all tokens.
        tokens: what to divide by, where it is not the pass's own valid tokens: the whole step's make the losses of its
            micro-batches and ranks add up to the step's.

    transformers' ``load_balancing_loss_func`` sums load over the K choices where this one takes fractions of all T * K
    assignments: for one layer, its value is K times this one.
    """
    load = sums.assignments if assignments is None else assignments
    total = load.sum(dim=-1, keepdim=True).clamp(min=1)
    if tokens is None:
        tokens = (sums.assignments.sum(dim=-1) / chosen).clamp(min=1)
    balance = load.shape[-1] * (load / total * sums.probability).sum(dim=-1) / tokens
    return RouterLosses(balance.mean(), (sums.z / tokens).mean())


class Router(nn.Linear):
    """x [T, D] -> (Routing, RouterSums). Its state: weight [E, D] and, with a bias rate, expert_bias float32 [E].

    A Linear, so that a seed gives the weights that it always gave.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.width, config.experts, bias=False)
        self.config = config
        biased = config.router_bias_rate is not None
        self.register_buffer("expert_bias", torch.zeros(config.experts) if biased else None)

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, valid_T: Tensor | None = None
    ) -> tuple[Routing, RouterSums]:
        """Tokens that are not ``valid_T`` (padding) are routed like any other and count nowhere."""
        c = self.config
        # In float32 whatever the products run in: rounding logits flips choices (ST-MoE).
        if self.training and c.router_jitter > 0:
            x_TD = x_TD.float()
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - c.router_jitter, 1 + c.router_jitter)
        logits_TE = float32_linear(x_TD, self.weight)
        routing = choose(logits_TE, c.experts_chosen, c.router_normalize, c.router_score, self.expert_bias)
        sums = RouterSums(
            count_assignments(routing.expert_index_TK, c.experts, valid_T),
            _sum_valid(routing.probability_TE, valid_T),
            _sum_valid(logits_TE.logsumexp(dim=-1).square(), valid_T)
            if c.router_z_loss_weight > 0
            else logits_TE.new_zeros(()),
        )
        return routing, sums


@torch.no_grad()
def move_biases(model: nn.Module, assignments_LE: Tensor) -> None:
    """Move each layer's bias by its rate towards balance; nothing where the configuration has no biases.

    To be called once an optimizer step. assignments_LE: int64, of all of the step's micro-batches and ranks, so that
    every rank moves its copy alike.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    # sign(mean - load), without dividing
    direction_LE = (assignments_LE.sum(dim=-1, keepdim=True) - assignments_LE.shape[-1] * assignments_LE).sign()
    for router, direction_E in zip(routers, direction_LE, strict=True):
        if router.expert_bias is not None:
            router.expert_bias.add_(direction_E, alpha=router.config.router_bias_rate or 0.0)


def load_metrics(assignments_LE: Tensor) -> dict[str, Any]:
    """How evenly the experts are used, from a step's assignments [L, E]. Copies them to the host.

    A value a layer: expert_tokens (a list of E), expert_load_max (the fullest expert over the mean, 1 when even),
    layer_entropy (of the load, over log E: 1 when even), layer_dead_experts (those that got nothing). Of all layers:
    expert_load_max_worst, expert_entropy (the mean), dead_experts (the sum).
    """
    assignments_LE = assignments_LE.cpu()
    experts = assignments_LE.shape[1]
    load_LE = assignments_LE.double() / assignments_LE.sum(dim=1, keepdim=True).clamp(min=1)
    fullest = (load_LE.amax(dim=1) * experts).tolist()
    entropy_L = torch.special.entr(load_LE).sum(dim=1)
    # One expert is even by itself.
    entropy_L = entropy_L / math.log(experts) if experts > 1 else torch.ones_like(entropy_L)
    dead = (assignments_LE == 0).sum(dim=1).tolist()
    return {
        "expert_tokens": assignments_LE.tolist(),
        "expert_load_max": fullest,
        "expert_load_max_worst": max(fullest),
        "layer_entropy": entropy_L.tolist(),
        "expert_entropy": float(entropy_L.mean()),
        "layer_dead_experts": dead,
        "dead_experts": sum(dead),
    }
