"""What fits and how fast: memory, time and MFU of a training before anything is spent on it.

``estimate`` is a pure function of a model, a training's shape and a machine; model/train/memory.py and speed.py say how
it counts. benchmarks/memory.py holds it against measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from model.config import ModelConfig
from model.errors import ModelError
from model.train.machine import Machine
from model.train.memory import Memory, TrainShape, peak
from model.train.speed import Time, flops_per_token, step_time

# As many GPUs as are looked at when fewer do not fit.
MOST_GPUS = 16384
# Sequences a forward pass that are looked at; larger ones gain little.
MICRO_BATCH = 4
SECONDS_A_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one training on one machine. moment: when memory peaks; memory: bytes on a GPU then, by part."""

    config: ModelConfig
    shape: TrainShape
    machine: Machine
    moment: str
    memory: Memory
    time: Time

    @property
    def total(self) -> int:
        """Bytes that each GPU must have."""
        return self.memory.total(self.machine)

    @property
    def spare(self) -> int:
        """Bytes left on each GPU; negative where it does not fit."""
        return self.machine.memory - self.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def tokens_per_second(self) -> float:
        """On all GPUs."""
        return self.shape.tokens_per_step / self.time.step

    @property
    def mfu(self) -> float:
        """Model FLOPs over the GPUs' peak (fraction)."""
        flops = flops_per_token(self.config, self.shape.sequence_length)
        return flops * self.tokens_per_second / (self.shape.gpus * self.machine.peak_flops)

    def days(self, tokens: float) -> float:
        """Days to train on this many tokens."""
        return tokens / self.tokens_per_second / SECONDS_A_DAY


def estimate(config: ModelConfig, shape: TrainShape, machine: Machine) -> Estimate:
    """Memory and speed of a training. Errors: ModelError (2) where expert_parallel does not divide the experts."""
    if config.experts % shape.expert_parallel:
        raise ModelError(
            f"{config.experts} experts cannot be spread over {shape.expert_parallel} GPUs; "
            "take an expert_parallel that divides them.",
            2,
        )
    moment, memory = peak(config, shape, machine)
    time = step_time(config, shape, machine)
    return Estimate(config=config, shape=shape, machine=machine, moment=moment, memory=memory, time=time)


def _variants(config: ModelConfig, shape: TrainShape, gpus: int) -> Iterator[TrainShape]:
    """Every way to train with the same tokens a step on so many GPUs that a change of settings can reach.

    The micro-batch is halved (and gradients accumulated), checkpointing turned on, experts spread further; never back.
    More GPUs take over accumulated passes first, and are not offered where that leaves a fraction of a pass.
    """
    batch = shape.gpus * shape.accumulation * shape.micro_batch_size
    micro = [shape.micro_batch_size >> n for n in range(shape.micro_batch_size.bit_length())]
    for size in dict.fromkeys(micro):
        # Where the batch does not fill the GPUs, each has one pass: the batch grows.
        passes = max(1, batch // (gpus * size))
        if size > 1 and batch % (gpus * size):
            continue
        for ep in range(shape.expert_parallel, config.experts + 1):
            if config.experts % ep or gpus % ep or ep % shape.expert_parallel:
                continue
            for blocks in dict.fromkeys((shape.activation_checkpointing, "block")):
                changed = {"gpus": gpus, "micro_batch_size": size, "accumulation": passes}
                yield shape.model_copy(update={**changed, "expert_parallel": ep, "activation_checkpointing": blocks})


def _cheapest(config: ModelConfig, shape: TrainShape, machine: Machine, gpus: int) -> Estimate | None:
    """Of the variants on so many GPUs that fit, the fastest."""
    found = (estimate(config, variant, machine) for variant in _variants(config, shape, gpus))
    return max((e for e in found if e.fits), key=lambda e: e.tokens_per_second, default=None)


def fastest(
    config: ModelConfig, gpus: int, machine: Machine, sequence_length: int, micro_batch_size: int = MICRO_BATCH
) -> Estimate | None:
    """The fastest way to train on so many GPUs that fits, with micro-batches of at most so many sequences."""
    start = TrainShape(gpus=gpus, sequence_length=sequence_length, micro_batch_size=micro_batch_size)
    return _cheapest(config, start, machine, gpus)


def suggest(found: Estimate) -> Estimate | None:
    """The cheapest change that makes a training fit: the fastest on the same GPUs, else on twice as many, and so on.

    None where it fits already, or on MOST_GPUS does not.
    """
    if found.fits:
        return None
    gpus = found.shape.gpus
    while gpus <= MOST_GPUS:
        better = _cheapest(found.config, found.shape, found.machine, gpus)
        if better is not None:
            return better
        gpus *= 2
    return None


def changes(before: TrainShape, after: TrainShape) -> str:
    """What turns one shape into the other, in words."""
    words = []
    if after.gpus != before.gpus:
        words.append(f"{after.gpus:,} GPUs")
    if after.activation_checkpointing != before.activation_checkpointing:
        words.append("activation checkpointing by block")
    if after.micro_batch_size != before.micro_batch_size:
        words.append(f"micro-batches of {after.micro_batch_size}")
    if after.expert_parallel != before.expert_parallel:
        words.append(f"expert parallelism over {after.expert_parallel} GPUs")
    return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Largest:
    """What so many GPUs can train of one architecture.

    best: the fastest shape that fits, else the one that needs least. layers: the most blocks of this shape that fit, 0
    where not even one does; parameters: those of a model with so many.
    """

    best: Estimate
    layers: int
    parameters: int


def largest(config: ModelConfig, gpus: int, machine: Machine, sequence_length: int) -> Largest:
    """The fastest way to train the model on so many GPUs, and the deepest model of its blocks that they hold."""
    start = TrainShape(gpus=gpus, sequence_length=sequence_length, micro_batch_size=MICRO_BATCH)
    shapes = list(_variants(config, start, gpus))

    def needs(layers: int) -> int:
        deep = config.model_copy(update={"layers": layers})
        return min(peak(deep, shape, machine)[1].total(machine) for shape in shapes)

    low, high = 0, 1
    while needs(high) <= machine.memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= machine.memory else (low, middle)
    best = fastest(config, gpus, machine, sequence_length)
    if best is None:
        best = min((estimate(config, shape, machine) for shape in shapes), key=lambda e: e.total)
    deepest = config.model_copy(update={"layers": low}).parameters if low else 0
    return Largest(best=best, layers=low, parameters=deepest)
