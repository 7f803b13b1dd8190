"""One optimizer step: forward and backward by micro-batches, then one clipped update.

Nothing of it waits for the device but the one look at the figures, which falls between backward and update, where the
device has work on both sides of it.

Every rank calls it with its own sequences; sums over ranks make it the step of the whole batch, however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.network.router import move_biases, router_losses
from model.network.transformer import Transformer
from model.train.loss import NO_TARGET, cross_entropy_sum
from model.train.optimizer import AdamW
from model.train.world import World

if TYPE_CHECKING:
    from model.loader.loader import Batch
    from model.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one step over all ranks, on the device: scalars; assignments_LE, tokens an expert and layer (int64).

    row_loss: of this rank's sequences alone, each one's sum over its targets (nats).
    """

    loss: Tensor
    z_loss: Tensor
    aux_loss: Tensor
    router_z_loss: Tensor
    gradient_norm: Tensor
    assignments_LE: Tensor
    row_loss: Tensor


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on the device. From pinned memory, so that a copy waits for nothing."""
    if device.type != "cuda":
        return batch
    names = ("tokens", "segment_ids", "positions", "loss_mask")
    return replace(batch, **{n: getattr(batch, n).pin_memory().to(device, non_blocking=True) for n in names})


def compute_gradients(model: Transformer, optimizer: AdamW, batch: Batch, config: TrainConfig, world: World) -> Figures:
    """Leaves with the optimizer the gradient of the loss over the whole batch.

    batch: this rank's part of it, on the model's device. The loss is the mean over the targets of the whole batch,
    whatever the micro-batches and ranks; the router's losses are means over its tokens, the auxiliary one with the load
    of each micro-batch over all ranks: with micro-batches it depends on how a step is cut, and so on the ranks' number.
    """
    device, shape = model.device, model.config
    size = config.micro_batch_size or len(batch)
    counts = world.total(torch.stack((batch.loss_mask.sum(), (batch.segment_ids >= 0).sum())))
    targets, tokens = counts[0], counts[1]
    sums, rows = torch.zeros(4, device=device), []
    assignments_LE = torch.zeros(shape.layers, shape.experts, dtype=torch.int64, device=device)
    model.train()
    for start in range(0, len(batch), size):
        part = batch.slice(start, start + size)
        hidden = model.hidden(part.tokens, positions_BS=part.positions, segment_ids_BS=part.segment_ids)
        # A sequence's last token has no next one; whole sequences go on all the same, so that nothing is copied.
        targets_BS = torch.full_like(part.tokens, NO_TARGET)
        targets_BS[:, :-1] = part.tokens[:, 1:].where(part.loss_mask[:, 1:], NO_TARGET)
        h_ND, target_N = hidden.states.flatten(0, 1), targets_BS.flatten()
        found = cross_entropy_sum(h_ND, model.head_weight, target_N, config.loss_chunk, config.z_loss_weight)
        load_LE = world.total(hidden.router.assignments.clone())
        balance, router_z = router_losses(
            hidden.router, shape.experts_chosen, assignments=load_LE, tokens=tokens.clamp(min=1)
        )
        losses = shape.balance_loss_weight * balance + shape.router_z_loss_weight * router_z
        (found.total / targets + losses).backward()
        if size < len(batch):
            optimizer.accumulate()
        sums += torch.stack(
            (found.loss_N.sum() / targets, found.z_N.sum() / targets, balance.detach(), router_z.detach())
        )
        rows.append(found.loss_N.view(len(part), -1).sum(dim=1))
        assignments_LE += load_LE
    optimizer.add_up(world.group)
    loss, z_loss, aux_loss, router_z_loss = world.total(sums)
    return Figures(
        loss=loss,
        z_loss=z_loss,
        aux_loss=aux_loss,
        router_z_loss=router_z_loss,
        gradient_norm=optimizer.gradient_norm(world.group),
        assignments_LE=assignments_LE,
        row_loss=torch.cat(rows),
    )


def update(model: Transformer, optimizer: AdamW, figures: Figures, config: TrainConfig) -> None:
    """Clip by the norm of all gradients, update, move the routers' biases, and let the gradients go."""
    scale = (config.gradient_clip / (figures.gradient_norm + 1e-6)).clamp(max=1.0)
    optimizer.step(gradient_scale=scale)
    move_biases(model, figures.assignments_LE)
    optimizer.zero_grad()
