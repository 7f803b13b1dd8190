"""AdamW with decay on matrices only, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw

from kernels.adamw import adamw_step, join_float32, split_float32
from model.network.distributed import is_divided, local_part
from model.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0, 1, ... steps-1.

    Linear warm-up, then cosine (Loshchilov and Hutter 2017), or stable and a linear decay (WSD, Hu et al. 2024;
    linear after Hägele et al. 2024), both down to final_learning_rate_fraction at the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    low = config.final_learning_rate_fraction
    last = config.steps - 1
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
    decay = max(1, round(config.decay_fraction * config.steps))
    left = min(1.0, (last - step) / decay)
    return config.learning_rate * (low + (1 - low) * left)


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) over float32 weights, distributed ones too, and over bfloat16 weights.

    Of a bfloat16 weight the missing bits of the float32 master weight are kept beside it (kernels/adamw.py), so that
    nothing is lost to rounding. State of a parameter, as local tensors: exp_avg and exp_avg_sq in float32, remainder in
    int16 where the weight is bfloat16; there the moments may be bfloat16 too. ``steps`` counts the updates done.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.steps = 0
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in self.parameters():
            local = local_part(parameter.detach())
            dtype = moments if local.dtype == torch.bfloat16 else torch.float32
            state = {key: torch.zeros_like(local, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
            if local.dtype == torch.bfloat16:
                state["remainder"] = torch.zeros_like(local, dtype=torch.int16)
            self.state[parameter] = state

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them, group by group."""
        return (p for group in self.param_groups for p in group["params"])

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 weight (of a distributed parameter, this rank's part); not to be written to."""
        local = local_part(parameter.detach())
        remainder = self.state[parameter].get("remainder")
        return local if remainder is None else join_float32(local, remainder)

    @torch.no_grad()
    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the float32 weight (this rank's part)."""
        local = local_part(parameter.detach())
        remainder = self.state[parameter].get("remainder")
        if remainder is None:
            local.copy_(value)
        else:
            weight, rest = split_float32(value.to(local.device))
            local.copy_(weight)
            remainder.copy_(rest)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of bfloat16 weights to sums in float32, which the update takes in their place."""
        for parameter in self.parameters():
            if parameter.grad is not None and parameter.dtype == torch.bfloat16:
                gradient, total = local_part(parameter.grad), self._sums.get(parameter)
                if total is None:
                    self._sums[parameter] = gradient.float()
                else:
                    total.add_(gradient)
                parameter.grad = None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """What the update takes: the accumulated sum, else the gradient (this rank's part)."""
        gradient = self._sums.get(parameter, parameter.grad)
        return None if gradient is None else local_part(gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of gradients and sums."""
        super().zero_grad(set_to_none=set_to_none)
        self._sums.clear()

    @torch.no_grad()
    def add_up(self, group: ProcessGroup | None) -> None:
        """Add up over the group the gradients that each rank has whole; those of divided weights FSDP adds up."""
        gradients = self._gradients(divided=False)
        if group is None or not gradients:
            return
        total = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(total, group=group)
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def gradient_norm(self, group: ProcessGroup | None = None) -> Tensor:
        """The 2-norm of all gradients, float32 scalar on their device, over all ranks of ``group``.

        A gradient that is divided is so over all ranks of the group without overlap, along whatever dimensions of the
        mesh, so the sum of the parts' squares is that of the whole.
        """
        divided, whole = (self._squares(self._gradients(divided=divided)) for divided in (True, False))
        if group is not None:
            dist.all_reduce(divided, group=group)
        return (divided + whole).sqrt()

    def _gradients(self, *, divided: bool) -> list[Tensor]:
        found = ((p, self.gradient(p)) for p in self.parameters() if is_divided(p) is divided)
        return [gradient for _, gradient in found if gradient is not None and gradient.numel()]

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        """The sum of all their squares, float32."""
        if not gradients:
            return torch.zeros((), device=next(self.parameters()).device)
        return torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)).square().sum()

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: Tensor | None = None) -> None:  # type: ignore[override]
        """One update; gradients are multiplied by ``gradient_scale`` (float32 scalar), which the host need not know."""
        if gradient_scale is None:
            gradient_scale = torch.ones((), device=next(self.parameters()).device)
        self.steps += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            common = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
            common["weight_decay"] = group["weight_decay"]
            whole: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
            for parameter in group["params"]:
                weight, gradient, state = local_part(parameter), self.gradient(parameter), self.state[parameter]
                if gradient is None or not weight.numel():
                    continue
                moments = state["exp_avg"], state["exp_avg_sq"]
                if "remainder" in state:
                    adamw_step(
                        weight, state["remainder"], *moments, gradient, gradient_scale, step=self.steps, **common
                    )
                else:
                    whole.append((weight, gradient, *moments))
            if whole:
                weights, gradients, averages, squares = (list(column) for column in zip(*whole, strict=True))
                adamw(
                    weights, gradients, averages, squares, [],
                    # One each, because each is counted up; made on the device, because a copy would wait for it.
                    list(torch.full((len(weights),), self.steps - 1.0, device=weights[0].device).unbind()),
                    foreach=False, capturable=False, differentiable=False, fused=True,
                    # It divides by this.
                    grad_scale=gradient_scale.reciprocal(), found_inf=None,
                    has_complex=False, amsgrad=False, maximize=False, **common,
                )  # fmt: skip


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> AdamW:
    """Weights of two and more dimensions decay, gains do not."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=1e-8,
        moments=getattr(torch, config.moments),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = value
