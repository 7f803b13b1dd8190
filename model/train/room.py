"""Whether a training fits the memory that there is, said before it is made; and what to do where a GPU runs out of it.

Before, only what is certain counts: weights, gradients and AdamW's moments, and in main memory a checkpoint's copies.
What a forward pass needs beside them ``lakemoe train --dry-run`` estimates.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from model.config import ModelConfig
from model.errors import ModelError
from model.train.config import TrainConfig
from model.train.machine import GIB, MACHINES
from model.train.memory import TrainShape, checkpoint_copies, held, moments
from model.train.world import World

CPU_BYTES = 16  # a parameter: weight, gradient and two moments in float32
COPIES = "copies of weights and moments for checkpoints"


@contextlib.contextmanager
def within_memory(config: TrainConfig, model: ModelConfig, world: World) -> Iterator[None]:
    """A training within it that cannot fit does not begin, and one that runs out of a GPU's memory says what helps.

    Every rank enters it. Errors: ModelError, 2 where there is not enough, 75 where others have too much of it.
    """
    for things, need, device in _needed(config, model, world):
        # Machines may differ, and each rank would decide for itself.
        every = world.gather((need, *memory(device)))
        need, free, total = max(every, key=lambda rank: rank[0] - rank[1])
        if need <= free:
            continue
        where = "on this machine" if device.type == "cpu" else "on each GPU" if world.size > 1 else "on the GPU"
        what = f"{config.preset} has {model.parameters:,} parameters, whose {things} need {need / GIB:,.1f} GiB {where}"
        if need <= total:
            why = f"{what}, where {free / GIB:,.1f} of {total / GIB:,.1f} are free; end what has the others, run again."
            raise world.everywhere(ModelError(why, 75))
        more = "on more machines, or with train.moments bfloat16" if things == COPIES else "on more GPUs"
        why = f"{what}, which has {total / GIB:,.1f}; train a smaller preset or {more}: "
        raise world.everywhere(
            ModelError(f"{why}lakemoe train --dry-run --model {config.preset} says what holds it.", 2)
        )
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"The GPU's memory does not hold this training ({str(error).splitlines()[0]}); take "
            "train.activation_checkpointing block, a smaller train.micro_batch_size or more processes: "
            "lakemoe train --dry-run estimates each.",
            2,
        ) from error


def _needed(config: TrainConfig, model: ModelConfig, world: World) -> list[tuple[str, int, torch.device]]:
    """What for, bytes and where: on each GPU, or of the processes of this machine together in main memory."""
    on_gpus, processes = world.device.type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shape = TrainShape(
        gpus=world.size,
        expert_parallel=config.expert_parallel,
        moments=config.moments if on_gpus else "float32",
    )
    copies, cpu = processes * checkpoint_copies(model, shape), torch.device("cpu")
    if on_gpus:
        on_gpu = moments(model, shape, MACHINES["h200"])["optimizer"].allocated
        return [("weights, gradients and moments", on_gpu, world.device), (COPIES, copies, cpu)]
    trained = CPU_BYTES * processes * held(model, shape).all(model.layers)
    return [(f"weights, gradients, moments, and {COPIES},", trained + copies, cpu)]


def memory(device: torch.device, group: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Bytes that this process may still take, and that there are in all: of the GPU, or of main memory.

    Main memory is the machine's, or its container's where that has less (cgroup v2, seen from inside; limits of v1 and
    of groups above are not seen). Files that the kernel keeps in memory count as free, as it lets go of them.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no such files, or "max"
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(stat["active_file"]) + int(stat["inactive_file"])
        free, total = min(free, limit - used + files), min(total, limit)
    return free, total
