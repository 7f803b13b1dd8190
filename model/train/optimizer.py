"""AdamW with decay on matrices only, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

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


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weights of two and more dimensions decay, gains do not."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = value
