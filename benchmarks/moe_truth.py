"""A mixture-of-experts layer's inputs for the benchmark, and the truth in float64 that every contestant is held to.

What is checked is what is timed: the full batch. The truth is computed for a sample of it, so that it fits beside the
layer: for some tokens their output and the gradients of the tokens and of their experts' weights, and for some rows of
every expert's w1, v1 and w2 these rows' gradients, which sum over all of the expert's tokens. The same sample computed
in the layer's own dtype, product by product, is the unfused computation that a contestant's error is compared with.

Legend: T tokens, D model width, F expert width, E experts, K chosen experts a token, S sampled rows or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 256
ROWS = 16

NAMES = ("y", "x", "expert_weight", "w1", "v1", "w2")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer's sizes; `targets` are lakemoe's least ratios to dense, forward and forward + backward, on an H200."""

    T: int
    D: int
    F: int
    E: int
    K: int
    targets: tuple[float, float] | None = None
    saved_gib: float | None = None

    @property
    def forward_flops(self) -> int:
        return 6 * self.T * self.K * self.D * self.F


@dataclass(frozen=True, kw_only=True)
class Case:
    """Unit-scale inputs of one layer, with the choice of experts made and the gradient of the output given."""

    x_TD: Tensor
    router_ED: Tensor
    w1_EFD: Tensor
    v1_EFD: Tensor
    w2_EFD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    dy_TD: Tensor


def choose(x_TD: Tensor, router_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Router, softmax in float32, top-k, weights that sum to one: (index [T, K], weight [T, K] float32)."""
    weight_TK, index_TK = F.linear(x_TD, router_ED).float().softmax(-1).topk(top_k)
    return index_TK, weight_TK / weight_TK.sum(-1, keepdim=True)


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device, skew: float, seed: int = 0) -> Case:
    """A layer whose router picks experts at random with chances of Zipf's law of exponent `skew` (0: all alike).

    The router's rows are orthonormal, and within the space that they span x is set so that the logits are log(chance)
    + Gumbel noise: the K largest are then a draw without replacement, and still the router's real product decides.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g, device=device, dtype=dtype).mul_(scale)

    T, D, E = shape.T, shape.D, shape.E
    router_ED = torch.linalg.qr(torch.randn(D, E, generator=g, device=device))[0].t().contiguous()
    chance_E = torch.arange(1, E + 1, device=device, dtype=torch.float32).pow(-skew)
    chance_E = chance_E[torch.randperm(E, generator=g, device=device)]  # the popular experts anywhere
    x_TD = torch.randn(T, D, generator=g, device=device)
    noise_TE = -torch.rand(T, E, generator=g, device=device).clamp_(1e-20, 1 - 1e-7).log_().neg_().log_()
    x_TD += (chance_E.log() + noise_TE - x_TD @ router_ED.t()) @ router_ED
    x_TD, router_ED = x_TD.to(dtype), router_ED.to(dtype)
    index_TK, weight_TK = choose(x_TD, router_ED, shape.K)
    return Case(
        x_TD=x_TD,
        router_ED=router_ED,
        w1_EFD=normal(E, shape.F, D, scale=D**-0.5),
        v1_EFD=normal(E, shape.F, D, scale=D**-0.5),
        w2_EFD=normal(E, shape.F, D, scale=shape.F**-0.5),
        index_TK=index_TK,
        weight_TK=weight_TK,
        dy_TD=normal(T, D),
    )


@dataclass(frozen=True)
class Sample:
    """Which tokens, and which rows of each expert's matrices, are checked."""

    tokens: Tensor
    rows: Tensor

    @classmethod
    def of(cls, case: Case) -> Sample:
        g = torch.Generator().manual_seed(1)
        device = case.x_TD.device
        tokens = torch.randperm(case.x_TD.shape[0], generator=g)[:TOKENS].to(device)
        return cls(tokens, torch.randperm(case.w1_EFD.shape[1], generator=g)[:ROWS].to(device))

    def take(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The checked part of a contestant's full results (a result that it lacks is left out)."""
        return {
            name: (r.index_select(1, self.rows) if r.dim() == 3 else r.index_select(0, self.tokens))
            for name, r in results.items()
        }


def sampled(case: Case, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """The sample's results, each product in `dtype`; sums over the K experts of a token in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    y_SD = torch.zeros(len(sample.tokens), case.x_TD.shape[1], dtype=wide, device=case.x_TD.device)
    dx_SD = torch.zeros_like(y_SD)
    dweight_SK = torch.zeros(len(sample.tokens), case.index_TK.shape[1], dtype=wide, device=case.x_TD.device)
    rows: dict[str, list[Tensor]] = {"w1": [], "v1": [], "w2": []}
    index_SK = case.index_TK[sample.tokens]
    for e in range(case.w1_EFD.shape[0]):
        s, k = torch.nonzero(index_SK == e, as_tuple=True)
        if len(s):
            t = sample.tokens[s]
            w1_FD, v1_FD, w2_FD = (w[e].to(dtype) for w in (case.w1_EFD, case.v1_EFD, case.w2_EFD))
            x_nD = case.x_TD[t].to(dtype).requires_grad_()
            weight_n = case.weight_TK[t, k].to(wide).requires_grad_()
            out_nD = (F.silu(x_nD @ w1_FD.t()) * (x_nD @ v1_FD.t())) @ w2_FD
            y_nD = weight_n.unsqueeze(1) * out_nD.to(wide)
            dx_nD, dweight_n = torch.autograd.grad(y_nD, (x_nD, weight_n), case.dy_TD[t].to(wide))
            y_SD.index_add_(0, s, y_nD.detach())
            dx_SD.index_add_(0, s, dx_nD.to(wide))
            dweight_SK[s, k] = dweight_n
        for name, gradient in zip(rows, _rows_of(case, sample, e, dtype), strict=True):
            rows[name].append(gradient)
    weights = {name: torch.stack(parts) for name, parts in rows.items()}
    return {"y": y_SD.to(dtype), "x": dx_SD.to(dtype), "expert_weight": dweight_SK, **weights}


def _rows_of(case: Case, sample: Sample, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the sampled rows of one expert's w1, v1 and w2, over all of its tokens."""
    wide = torch.promote_types(dtype, torch.float32)
    t, k = torch.nonzero(case.index_TK == e, as_tuple=True)
    x_nD, dy_nD = case.x_TD[t].to(dtype), case.dy_TD[t].to(dtype)
    w1_SD, v1_SD, w2_SD = (w[e, sample.rows].to(dtype) for w in (case.w1_EFD, case.v1_EFD, case.w2_EFD))
    w1_SD.requires_grad_()
    v1_SD.requires_grad_()
    a_nS = F.silu(x_nD @ w1_SD.t()) * (x_nD @ v1_SD.t())
    dout_nD = (case.weight_TK[t, k].to(wide).unsqueeze(1) * dy_nD.to(wide)).to(dtype)
    dw1_SD, dv1_SD = torch.autograd.grad(a_nS, (w1_SD, v1_SD), dout_nD @ w2_SD.t())
    return dw1_SD, dv1_SD, a_nS.detach().t() @ dout_nD
