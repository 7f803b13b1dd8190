"""Held-out loss by domain while a training runs.

The same sequences at every look, whatever the ranks, the restarts and the training's seed: the first ones of a shuffled
validation split, read once and kept. Nothing of it enters a step: no gradient, no random number, no state.

Shapes: n sequences of this rank, S tokens a sequence.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from model.loader.loader import Batch, SequenceReader
from model.loader.order import Order
from model.loader.snapshot import EmptySplitError, Snapshot, open_sequences
from model.network.transformer import Transformer
from model.train.config import TrainConfig
from model.train.loss import token_losses
from model.train.step import to_device
from model.train.world import World


class Validation:
    """Looks at the first ``sequences`` of a split, or at all where there are fewer, ``at_once`` in a forward pass.

    Every rank has one and calls it alike. Memory: 17 bytes a token of this rank's part of the sequences.
    """

    def __init__(self, snapshot: Snapshot, sequences: int, at_once: int, world: World) -> None:
        count = min(sequences, snapshot.num_sequences)
        chosen = Order(snapshot, 0, (), 1).samples(0, count)
        mine = chosen[world.rank :: world.size]
        # Ranks go through the same number of passes, as they gather weights in each: who has fewer sequences than the
        # others looks at the first one again and does not count it.
        numbers = snapshot.domain_numbers(mine)
        mine = np.append(mine, chosen[: -(-count // world.size) - len(mine)])
        # At once, so that each row group is read once.
        (read,) = SequenceReader(snapshot, 0).batches([mine])
        self._batches = [read.slice(at, at + at_once) for at in range(0, len(read), at_once)]
        self._domains, self._world = snapshot.domains, world
        self._domain_n = torch.as_tensor(numbers, dtype=torch.int64, device=world.device)

    @torch.no_grad()
    def losses(self, model: Transformer, stop: threading.Event | None = None) -> dict[str, float]:
        """validation_loss (nats a target) and, of several domains, validation_loss/DOMAIN; the same on every rank.

        With validation_seconds, which are no part of the steps'. Nothing where any rank was told to stop meanwhile.
        """
        began = time.perf_counter()
        model.eval()
        device, of_rows = self._world.device, []
        for batch in self._batches:
            asked = float(stop is not None and stop.is_set())
            if stop is not None and self._world.total(torch.tensor(asked, device=device)) > 0:
                break
            of_rows.append(_row_losses(model, to_device(batch, device)))
        _let_go(model)
        if len(of_rows) < len(self._batches):
            return {}
        counted_2n = torch.cat(of_rows, dim=1)[:, : len(self._domain_n)]
        sums_2D = torch.zeros(2, len(self._domains), dtype=torch.float64, device=device)
        sums_2D.index_add_(1, self._domain_n, counted_2n)
        losses, targets = self._world.total(sums_2D).tolist()
        found = {"validation_loss": sum(losses) / max(1.0, sum(targets))}
        found["validation_seconds"] = time.perf_counter() - began
        if len(self._domains) > 1:
            of_domains = zip(self._domains, losses, targets, strict=True)
            found |= {f"validation_loss/{name}": loss / count for name, loss, count in of_domains if count}
        return found


def open_validation(
    train: Snapshot, config: TrainConfig, world: World, say: Callable[[str], None]
) -> Validation | None:
    """Of the version and edition that is trained on. None, and a word why, where its validation split is empty."""
    edition = (train.tokenizer_id, train.sequence_length)
    try:
        snapshot = open_sequences(train.lake, train.version, "validation", *edition)
    except EmptySplitError as error:
        say(f"no validation losses: {error}")
        return None
    at_once = config.micro_batch_size or config.global_batch_size // world.size
    return Validation(snapshot, config.validation_sequences, at_once, world)


def _row_losses(model: Transformer, batch: Batch) -> torch.Tensor:
    """Of each sequence the sum over its targets (nats), and their number; float64 [2, n]."""
    hidden = model.hidden(batch.tokens, positions_BS=batch.positions, segment_ids_BS=batch.segment_ids)
    counted = batch.loss_mask[:, 1:]
    targets = batch.tokens[:, 1:].where(counted, 0)
    nats = token_losses(hidden.states[:, :-1].flatten(0, 1), model.head_weight, targets.flatten())
    return torch.stack((nats.view_as(counted).where(counted, 0.0), counted)).sum(dim=2, dtype=torch.float64)


def _let_go(model: Transformer) -> None:
    """The gathered weights that FSDP keeps for a backward pass, which does not come.

    It remembers the order of that forward, too, until the next backward has ended: which first gathers one block early.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
