"""The processes that train one model together, and what they say to each other beside gradients.

One process is a world of its own, without torch.distributed. Several are started by whoever sets torchrun's environment
variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT): torchrun itself, TorchDistributor, jobs/launch.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from model.device import DeviceName, pick_device
from model.errors import ModelError

T = TypeVar("T")
# Rank 0 may read a large table's listing or ask a slow tracking server while the others wait.
PATIENCE = timedelta(minutes=30)
# While a checkpoint is written, ranks wait for the slowest disk.
PATIENCE_ASIDE = timedelta(hours=12)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among ``size``. group: all of them, None where it is alone; background: the same ones again, for
    what a thread says beside the training."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    background: ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank; where it raises there, ModelError on every rank."""
        if self.group is None:
            return make()
        said: list[Any] = [None, None]
        failure: Exception | None = None
        if self.main:
            try:
                said[0] = make()
            except Exception as error:
                failure = error
                said[1] = (str(error), getattr(error, "exit_code", 1))
        dist.broadcast_object_list(said, src=0, group=self.group)
        if failure is not None:
            raise failure
        if said[1] is not None:
            raise self.everywhere(ModelError(*said[1]))
        return said[0]

    def everywhere(self, error: ModelError) -> ModelError:
        """An error that every rank raises alike, marked so that rank 0 alone tells it."""
        error.told_by_main = not self.main
        return error

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of ranks, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


ALONE = World(device=torch.device("cpu"))


@contextlib.contextmanager
def join_world(device: DeviceName) -> Iterator[World]:
    """This process's world, left at the end. Errors: ModelError (2) for a device that is not there."""
    picked = pick_device(device, "train.device")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=picked)
        return
    if picked.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ModelError(
                f"There are {torch.cuda.device_count()} GPUs here and a process number {local} (from 0); "
                "start one process a GPU.",
                2,
            )
        picked = torch.device("cuda", local)
        torch.cuda.set_device(picked)
    # gloo beside NCCL: objects and checkpoints go by the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo", timeout=PATIENCE)
    aside = cast(ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE_ASIDE))
    yield World(device=picked, rank=dist.get_rank(), size=size, group=dist.group.WORLD, background=aside)
    # Not after an error: NCCL would wait for peers that wait for this rank, where its end lets torchrun end them.
    # While this waits, gloo's threads let go of the last tensors; one that does so as Python ends aborts the process
    # (3 of 47 runs of two, torch 2.15), and the launcher takes what is done for a failure.
    dist.barrier(group=aside)
    dist.destroy_process_group()
