"""Whether a training fits the memory that there is, said before it is made; and what to do where a GPU runs out of it.

Before, only what is certain counts: weights, gradients and AdamW's moments. What a forward pass needs beside them
``lakemoe train --dry-run`` estimates.
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
from model.train.memory import TrainShape, held, moments
from model.train.world import World

CPU_BYTES = 16  # a parameter: weight, gradient and two moments in float32


@contextlib.contextmanager
def within_memory(config: TrainConfig, model: ModelConfig, world: World) -> Iterator[None]:
    """A training within it that cannot fit does not begin, and one that runs out of a GPU's memory says what helps.

    Every rank enters it. Errors: ModelError (2).
    """
    world.from_main(lambda: _check(config, model, world))
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"The GPU's memory does not hold this training ({str(error).splitlines()[0]}); take "
            "train.activation_checkpointing block, a smaller train.micro_batch_size or more processes: "
            "lakemoe train --dry-run estimates each.",
            2,
        ) from error


def _check(config: TrainConfig, model: ModelConfig, world: World) -> None:
    shape = TrainShape(gpus=world.size, expert_parallel=config.expert_parallel, moments=config.moments)
    if world.device.type == "cuda":
        need, free = moments(model, shape, MACHINES["h200"])["optimizer"].allocated, torch.cuda.mem_get_info()[0]
        where = "on each GPU" if world.size > 1 else "on the GPU"
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        need, free = CPU_BYTES * here * held(model, shape).all(model.layers), free_memory()
        where = "on this machine"
    if need > free:
        raise ModelError(
            f"{config.preset} has {model.parameters:,} parameters, whose weights, gradients and moments need "
            f"{need / GIB:,.1f} GiB {where}, where {free / GIB:,.1f} are free; train a smaller preset or on more GPUs: "
            f"lakemoe train --dry-run --model {config.preset} says what holds it.",
            2,
        )


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that this process may still take: the machine's, and its container's (cgroup v2)."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no such files, or "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free
