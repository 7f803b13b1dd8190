"""The numbers of a step, from the device to the journal's line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.network.router import load_metrics
from model.train.machine import MACHINES
from model.train.speed import flops_per_token
from model.train.step import Figures
from model.train.world import World

if TYPE_CHECKING:
    from model.loader.loader import Batch


def read(
    figures: Figures, batch: Batch, domains: Sequence[str], stop: bool, world: World
) -> tuple[dict[str, Any], bool]:
    """A step's line, the same on every rank, and whether any rank was told to stop. Waits for the device once.

    loss (nats a target, without other losses), loss/DOMAIN where the batch has targets of it, z_loss (mean squared log
    of the output's denominator), aux_loss and router_z_loss (before their weights), gradient_norm (before clipping),
    and how the experts are used (model/network/router.py). Errors: ModelError where the batch has no target.
    """
    device = figures.loss.device
    row_targets = batch.loss_mask[:, 1:].sum(dim=1)
    index = torch.tensor([domains.index(d) for d in batch.domains], device=device)
    mine = index[None, :] == torch.arange(len(domains), device=device)[:, None]
    sums = torch.stack((
        figures.row_loss.where(mine, 0.0).sum(dim=1).double(),
        (mine * row_targets).sum(dim=1).double(),
        torch.full((len(domains),), float(stop), device=device, dtype=torch.float64),
    ))  # fmt: skip
    world.total(sums)
    names = ("loss", "z_loss", "aux_loss", "router_z_loss", "gradient_norm")
    scalars = torch.stack([getattr(figures, name) for name in names]).double()
    values = torch.cat((scalars, sums.flatten())).tolist()
    line: dict[str, Any] = dict(zip(names, values, strict=False))
    n = len(domains)
    losses, targets, stopping = (values[5 + k * n : 5 + (k + 1) * n] for k in range(3))
    if not sum(targets):
        raise world.everywhere(
            ModelError("A batch has no target: every document has one token; pack longer documents.")
        )
    if len(domains) > 1:
        line |= {f"loss/{d}": x / t for d, x, t in zip(domains, losses, targets, strict=True) if t}
    return line | load_metrics(figures.assignments_LE), stopping[0] > 0


def not_finite(line: dict[str, Any]) -> bool:
    """Whether the loss or the gradient is no number that a step can be made from."""
    return not all(math.isfinite(line[name]) for name in ("loss", "gradient_norm"))


class Speed:
    """tokens_per_second, mfu (of the GPUs' stated peak; none on other devices) and memory_gib, the peak so far."""

    def __init__(self, config: ModelConfig, sequence_length: int, world: World) -> None:
        self.device = world.device
        self.flops = flops_per_token(config, sequence_length)
        self.peak = 0.0
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device).lower()
            self.peak = world.size * next((m.peak_flops for key, m in MACHINES.items() if key in name), 0.0)

    def line(self, tokens: int, seconds: float) -> dict[str, float]:
        """Of a step over all ranks."""
        rate = tokens / seconds
        line = {"tokens_per_second": rate}
        if self.peak:
            line["mfu"] = self.flops * rate / self.peak
        if self.device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return line
