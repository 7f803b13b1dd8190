"""Time of a training step by part, in closed form, and MFU; the machine's assumptions are fields of `Machine`.

Compute: the expert layer's time is two rates fitted to the six measured shapes of kernels/README.md, products at a
fraction of peak (an expert's last tile of 128 rows is half empty) plus a few passes of the assignments' rows over
memory. The fit misses those six by 5 % at most, and each of them by 9 % at most when it is fitted to the other five.
Projections and head run at cuBLAS's rate; attention's rate is assumed; norms and AdamW run at memory's. Nothing waits:
no straggling GPU, no loading of data, no checkpoint is counted, so a training of many nodes is slower than this.

Network, on several GPUs: each micro-batch gathers every block's bfloat16 parameters in forward and again in backward
and reduces its gradients in float32. A block's compute hides ``overlap`` of it, all-to-all hides behind nothing, nor do
FSDP's copies of all that it gathers and reduces. Expert parallel ranks are neighbours, so that up to a node's GPUs they
use NVLink alone. Beside two H100 (benchmarks/README.md, "Several GPUs") the estimate is 1.05 to 1.2 times too fast.

Legend: T tokens of a micro-batch on one GPU, D width, F expert width, E experts, K chosen, N = T*K assignments,
V vocabulary, L layers, S sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

from model.config import ModelConfig
from model.train.machine import Machine
from model.train.memory import BF16, FLOAT, TrainShape, assignments, held, whole

_HALF_TILE = 64  # rows
# Bytes a weight of a step of AdamW (kernels/adamw.py) and of the gradients' norm, by the moments' dtype.
_OPTIMIZER_BYTES = {"float32": 26 + 2, "bfloat16": 18 + 2}


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of training on one token: 6 * active parameters without the input embedding + 6 * L * S * D.

    The definition of the project's MFU; attention counts as causal, recomputation does not count. A tied head counts.
    """
    embedding = 0 if config.tied_head else config.vocab_size * config.width
    return 6.0 * (config.active_parameters - embedding) + 6.0 * config.layers * sequence_length * config.width


@dataclass(frozen=True, kw_only=True)
class Time:
    """Seconds of an optimizer step, by part. The parts add up: what is hidden behind compute is left out."""

    experts: float
    projections: float
    attention: float
    head: float
    elementwise: float  # norms, residuals, rotary embedding, adding up gradients
    recompute: float  # forward once more, by activation checkpointing
    parameters: float  # gathers and reductions that nothing hides, FSDP's copies before and after them
    all_to_all: float
    optimizer: float

    @property
    def step(self) -> float:
        return sum(float(getattr(self, part.name)) for part in fields(self))


def expert_seconds(rows: int, experts: int, config: ModelConfig, machine: Machine, *, backward: bool) -> float:
    """One pass of the expert layer over ``rows`` assignments and ``experts`` experts on a GPU."""
    D, F = config.width, config.expert_width
    rate = machine.expert_backward if backward else machine.expert_forward
    passes = machine.expert_passes_backward if backward else machine.expert_passes_forward
    flops = (12 if backward else 6) * (rows + _HALF_TILE * min(experts, rows)) * D * F
    products = flops / (rate * machine.peak_flops)
    # With few rows an expert, reading the weights (and in backward writing as many gradients) takes longer.
    weights = (2 if backward else 1) * 3 * BF16 * experts * D * F / machine.memory_bandwidth
    return max(products, weights) + passes * BF16 * rows * D / machine.memory_bandwidth


def _collective(size: float, ranks: int, stride: int, machine: Machine) -> float:
    """Seconds to gather (or reduce) ``size`` bytes over ``ranks`` GPUs that lie ``stride`` apart.

    Each byte enters a node once, by the networks of those of its GPUs that take part, and is passed on by NVLink.
    """
    if ranks == 1:
        return 0.0
    local = max(1, min(ranks, machine.gpus_per_node // stride))
    nodes = ceil(ranks / local)
    outside = size * (nodes - 1) / nodes / (local * machine.network)
    inside = size * (local - 1) / local / machine.nvlink
    return max(outside, inside) / machine.links + machine.latency + nodes * machine.latency_node


def _all_to_all(size: float, ranks: int, machine: Machine) -> float:
    """Seconds for each of ``ranks`` neighbouring GPUs to send ``size`` bytes, an equal part to each."""
    if ranks == 1:
        return 0.0
    local = min(ranks, machine.gpus_per_node)
    inside = size * (local - 1) / ranks / machine.nvlink
    outside = size * (ranks - local) / ranks / machine.network
    return max(inside, outside) / machine.links + machine.latency + ceil(ranks / local) * machine.latency_node


def step_time(config: ModelConfig, shape: TrainShape, machine: Machine) -> Time:
    """Seconds of one optimizer step on every GPU."""
    L, D, V, S, T = config.layers, config.width, config.vocab_size, shape.sequence_length, shape.tokens
    ep, again = shape.expert_parallel, shape.activation_checkpointing == "block"
    matmul, memory = machine.matmul * machine.peak_flops, machine.elementwise * machine.memory_bandwidth
    rows, experts = assignments(config, shape, machine), config.experts // ep
    used, mine = whole(config, shape), held(config, shape)

    # One block's forward, and its backward.
    expert = [expert_seconds(rows, experts, config, machine, backward=b) for b in (False, True)]
    qkv = config.query_width + 2 * config.kv_width
    projection = 2 * T * D * (qkv + config.query_width + config.experts) / matmul
    attention = 2 * T * S * config.query_width / (machine.attention * machine.peak_flops)
    # Compiled whole, each tensor is read or written once; under expert parallelism the pieces are.
    passes = (9 if ep > 1 else 7) * BF16 * T * D + 2 * BF16 * T * qkv
    # Rows to the order of their experts and back (kernels/permute.py), each read and written once.
    passes += 4 * BF16 * rows * D if ep > 1 else 0
    stream = passes / memory
    forward = expert[0] + projection + attention + stream
    backward = expert[1] + 2 * (projection + stream) + 2.5 * attention  # attention's backward has five products
    exchange = _all_to_all(BF16 * rows * D, ep, machine)

    gather = _collective(BF16 * used.dense, shape.gpus, 1, machine)
    gather += _collective(BF16 * used.experts, shape.gpus // ep, ep, machine)
    reduce = _collective(FLOAT * used.dense, shape.gpus, 1, machine)
    reduce += _collective(FLOAT * used.experts, shape.gpus // ep, ep, machine)
    hidden = machine.overlap
    exposed = max(0.0, gather - hidden * forward)
    exposed += max(0.0, gather + reduce - hidden * (backward + (forward if again else 0.0)))
    # Embedding and head: gathered before the first block, reduced after the last; no compute hides that.
    root = used.embedding + used.head
    outer = _collective(BF16 * root, shape.gpus, 1, machine) + _collective(FLOAT * root, shape.gpus, 1, machine)
    # Read and written: parts to a buffer and what came to its place, twice a block; gradients to a buffer in float32,
    # sums to bfloat16.
    copied = 0.0
    if shape.sharded:
        copied = (4 * BF16 + BF16 + FLOAT) * (L * used.block + root) + (5 * BF16 + FLOAT) * mine.all(L)
    head = (
        6 * T * D * V / matmul + 5 * BF16 * T * V / memory
    )  # logits and their gradient are read or written five times
    head += ceil(T / shape.loss_chunk) * 2 * FLOAT * V * D / memory  # each chunk adds to the head's gradient
    times = shape.accumulation
    adding = 0.0 if times == 1 else (BF16 + 2 * FLOAT) * mine.all(L) / memory
    return Time(
        experts=times * L * sum(expert),
        projections=times * L * 3 * projection,
        attention=times * L * 3.5 * attention,
        head=times * head,
        elementwise=times * (L * 3 * stream + adding),
        recompute=times * L * forward if again else 0.0,
        parameters=times * (L * exposed + outer + copied / memory),
        all_to_all=times * L * exchange * (6 if again else 4),
        # Sums of several passes are float32, and are read by both.
        optimizer=(_OPTIMIZER_BYTES[shape.moments] + (4 if times > 1 else 0)) * mine.all(L) / memory,
    )
