"""GPU memory of a training step, by part and by moment, in closed form: nothing is allocated and torch is not imported.

A step has a few moments at one of which memory peaks: the loss, the head's backward, the backward of the block that
comes first and of the one that comes last (gradients have grown, activations have shrunk) and the optimizer. Each is
added up from what the trainer holds then; the peak is the largest.

What is modelled, and must stay in step with the trainer and the kernels:

- Weights lie in bfloat16 beside the 16 missing bits of their float32 masters (kernels/adamw.py), gradients in bfloat16,
  AdamW's two moments in float32 or bfloat16: 14 or 10 bytes a parameter; norms and routers are float32. Where gradients
  add up over several forward passes, they do so in float32, beside those of the pass.
- Several GPUs: FSDP2 shards all of these but norms' and routers'. Experts lie on ``expert_parallel`` neighbours, and
  what a rank has of them is divided over the other ranks by their width, where that divides, else by whole experts; all
  else by rows. Blocks are gathered and freed after use, in forward and in backward; embedding and head, the root, stay
  gathered to the end of backward. Gradients are reduced in float32, block by block, the root's at the end.
- The residual stream is bfloat16. ``kept_per_token`` is what a block keeps for backward where it is compiled whole, as
  torch's partitioner cuts it (2.15, read from its graphs); with ``expert_parallel`` its parts are, which keep about the
  same. Attention is fused and keeps no scores.
- The expert kernels' own rows are those that kernels/grouped.py allocates, step by step.
- Loss in chunks (model/train/loss.py): the head's gradient is made in the forward pass, in float32.

Legend: T tokens of a micro-batch on one GPU, D width, F expert width, E experts, K chosen, N = T*K assignments,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.config import ModelConfig
from model.train.machine import Machine

BF16, FLOAT = 2, 4
# Copies of a block's bfloat16 parameters that FSDP2 holds: those that are computed with and one buffer, which they came
# in (forward) or which the next come in (backward).
GATHERED = 2


class TrainShape(BaseModel):
    """How a model is trained, as far as memory and time depend on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int = Field(1, ge=1, description="GPUs; each has its own sequences")
    sequence_length: int = Field(4096, ge=1, description="tokens a sequence")
    micro_batch_size: int = Field(1, ge=1, description="sequences a GPU in one forward pass")
    accumulation: int = Field(1, ge=1, description="forward passes a step; gradients add up over them")
    expert_parallel: int = Field(1, ge=1, description="GPUs that the experts of a block are spread over")
    activation_checkpointing: Literal["none", "block"] = Field(
        "none", description="block: keep each block's input only and compute the rest again in backward"
    )
    moments: Literal["float32", "bfloat16"] = Field("float32", description="AdamW's moments")
    loss_chunk: int = Field(1024, ge=1, description="tokens whose logits exist at the same time")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.gpus % self.expert_parallel:
            raise ValueError(f"expert_parallel ({self.expert_parallel}) must divide the number of GPUs ({self.gpus})")
        return self

    @property
    def sharded(self) -> bool:
        """Whether parameters are sharded: on more than one GPU."""
        return self.gpus > 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one GPU."""
        return self.micro_batch_size * self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step on all GPUs."""
        return self.gpus * self.accumulation * self.tokens


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest GPU at one moment, by part."""

    weights: int  # masters, in one piece or two
    gradients: int
    moments: int
    copies: int  # bfloat16 parameters that FSDP gathered
    activations: int  # kept from forward to backward
    working: int  # of the block, or the optimizer, that is at work
    logits: int  # logits of a chunk, the head's gradient before it is reduced
    communication: int  # dispatched rows, gradients on their way to their shards

    @property
    def allocated(self) -> int:
        """Sum of the parts: what torch.cuda.max_memory_allocated measures."""
        return sum(getattr(self, part.name) for part in fields(self))

    def reserve(self, machine: Machine) -> int:
        """What the process holds beside it: context, libraries, the allocator's gaps."""
        return machine.overhead + int(machine.fragmentation * self.allocated)

    def total(self, machine: Machine) -> int:
        """What the GPU must have."""
        return self.allocated + self.reserve(machine)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of one block but its experts', of its experts, of the embedding, the head and the last norm."""

    dense: int
    experts: int
    embedding: int
    head: int
    norm: int
    floats: int  # of dense: norms and router, which no GPU computes with in bfloat16

    @property
    def block(self) -> int:
        return self.dense + self.experts

    def all(self, layers: int) -> int:
        """Of the whole model."""
        return layers * self.block + self.embedding + self.head + self.norm


def _matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of a block's attention projections."""
    return [
        (config.query_width + 2 * config.kv_width, config.width),
        (config.width, config.query_width),
    ]


def _norms(config: ModelConfig) -> int:
    """Gains of a block's norms."""
    of_heads = config.query_width + config.kv_width if config.qk_norm else 0
    return (4 if config.post_norm else 2) * config.width + of_heads


def held(config: ModelConfig, shape: TrainShape) -> Counts:
    """Parameters whose masters lie on the fullest GPU. Shards are whole rows, so that they may be unequal."""
    gpus = shape.gpus

    def shard(rows: int, columns: int) -> int:
        return ceil(rows / gpus) * columns

    experts, within = config.experts // shape.expert_parallel, gpus // shape.expert_parallel
    if config.expert_width % within:
        part = ceil(experts / within) * config.expert_parameters
    else:
        part = experts * config.expert_parameters // within
    vocabulary = shard(config.vocab_size, config.width)
    floats = config.experts * config.width + _norms(config)  # never divided
    return Counts(
        dense=sum(shard(*size) for size in _matrices(config)) + floats,
        experts=part,
        embedding=vocabulary,
        head=0 if config.tied_head else vocabulary,
        norm=config.width,
        floats=floats,
    )


def checkpoint_copies(config: ModelConfig, shape: TrainShape) -> int:
    """Bytes of main memory in which a process keeps its share of a checkpoint (share.py), on average: float32 weights,
    which are dealt out by files of up to 5 GB, and the moments that it has."""
    return FLOAT * config.parameters // shape.gpus + 2 * _moment_bytes(shape) * held(config, shape).all(config.layers)


def checkpoint_bytes(config: ModelConfig, shape: TrainShape) -> int:
    """Bytes of a checkpoint on the disk."""
    return (FLOAT + 2 * _moment_bytes(shape)) * config.parameters


def _moment_bytes(shape: TrainShape) -> int:
    return FLOAT if shape.moments == "float32" else BF16


def whole(config: ModelConfig, shape: TrainShape) -> Counts:
    """Parameters that a GPU computes with: all dense ones, and the experts of its expert-parallel rank."""
    alone = held(config, TrainShape())
    return replace(alone, experts=alone.experts // shape.expert_parallel)


def assignments(config: ModelConfig, shape: TrainShape, machine: Machine) -> int:
    """N on the fullest GPU."""
    uneven = machine.imbalance if shape.expert_parallel > 1 else 1.0
    return ceil(shape.tokens * config.experts_chosen * uneven)


def kept_per_token(config: ModelConfig) -> dict[str, int]:
    """Bytes a token that one block keeps for backward beside its experts' rows, by what they are."""
    D, qkv = config.width, config.query_width + 2 * config.kv_width
    kept = {
        "block input": BF16 * D,
        "attention's input": BF16 * D,
        "queries, keys, values": BF16 * qkv,
        "attention's result": BF16 * config.query_width + FLOAT * config.heads,
        "after attention": BF16 * D,
        "experts' and router's input": BF16 * D,
        # Probabilities; of each choice its expert (int64), its weight and the kernels' three maps (int32).
        "router": FLOAT * config.experts + 24 * config.experts_chosen,
    }
    if config.qk_norm:
        kept["before normalisation"] = BF16 * qkv
    if config.qkv_clip is not None:
        kept["what was clipped"] = qkv  # a mask of bytes
    if config.post_norm:
        kept["before post-normalisation"] = 2 * BF16 * D
    else:
        kept["attention's projection"] = BF16 * D
    return kept


def kept(config: ModelConfig, shape: TrainShape, machine: Machine) -> int:
    """Bytes that one block keeps from forward to backward without checkpointing, its weights' copies not counted."""
    rows = assignments(config, shape, machine)
    experts = rows * 2 * BF16 * config.expert_width  # both pre-activations
    received = rows * BF16 * config.width if shape.expert_parallel > 1 else 0
    return shape.tokens * sum(kept_per_token(config).values()) + experts + received


def _working(config: ModelConfig, shape: TrainShape, machine: Machine) -> tuple[int, int]:
    """Most bytes that a block's forward and backward need for a while: rows of kernels/grouped.py, its gradients."""
    D, F, T = config.width, config.expert_width, shape.tokens
    N = assignments(config, shape, machine)
    weight = BF16 * config.experts // shape.expert_parallel * F * D
    forward = BF16 * N * (D + F) + 2 * BF16 * T * D
    # dh and du, sorted rows, then weight * a beside dw2, or dw2, dw1 and dv1.
    backward = BF16 * N * (2 * F + D) + max(BF16 * N * F + weight, 3 * weight) + 3 * BF16 * T * D
    return forward, backward


def moments(config: ModelConfig, shape: TrainShape, machine: Machine) -> dict[str, Memory]:
    """Memory at each moment of a step at which it may peak. Errors: ValueError where expert_parallel does not divide.

    A step that is not the first: AdamW has its moments.
    """
    if config.experts % shape.expert_parallel:
        raise ValueError(f"expert_parallel ({shape.expert_parallel}) must divide the experts ({config.experts})")
    L, T, D = config.layers, shape.tokens, config.width
    mine, used = held(config, shape), whole(config, shape)
    sharded, blocks = shape.sharded, shape.activation_checkpointing == "block"
    root, head = used.embedding + used.head, config.vocab_size * D
    stream = BF16 * T * D
    one = kept(config, shape, machine)
    sent = assignments(config, shape, machine) * D if shape.expert_parallel > 1 else 0
    between, again = (stream, one) if blocks else (one, 0)  # kept of a block; made once more in its backward
    if blocks:
        again -= stream  # the block's input is kept once
    forward, backward = _working(config, shape, machine)

    def gradient(count: int, floats: int = 0) -> int:
        """Bytes of gradients, of which ``floats`` are of norms and routers."""
        return BF16 * count + (FLOAT - BF16) * floats

    block_gradient = gradient(mine.block, mine.floats)
    every = L * block_gradient + gradient(mine.embedding + mine.head + mine.norm, mine.norm)
    # On one GPU the head's gradient is one of the parameters' own; FSDP's waits in bfloat16 for the end of backward.
    outer, waiting = (0, BF16 * head) if sharded else (gradient(head + mine.norm, mine.norm), 0)
    gathered = GATHERED * BF16 * used.block if sharded else 0
    kept_root = BF16 * root if sharded else 0
    # FSDP holds the float32 gradients of the unit before until it reduces the next one's.
    reducing = FLOAT * (used.block if shape.expert_parallel == 1 else used.dense) if sharded else 0
    floats = L * mine.floats + mine.norm
    sums = FLOAT * (mine.all(L) - floats) if shape.accumulation > 1 else 0

    def memory(
        gradients: int = 0, copies: int = 0, activations: int = 0, working: int = 0, logits: int = 0, network: int = 0
    ) -> Memory:
        return Memory(
            weights=FLOAT * mine.all(L),
            moments=2 * (_moment_bytes(shape) * (mine.all(L) - floats) + FLOAT * floats),
            gradients=sums + gradients,
            copies=copies,
            activations=activations,
            working=working,
            logits=logits,
            communication=network,
        )

    found = {
        "forward of the last block": memory(
            copies=kept_root + gathered,
            activations=(L - 1) * between + one,
            working=forward,
            network=2 * BF16 * sent,
        ),
        # The last norm's input and result, the loss's gradient; logits and their gradient; the head's, and in bfloat16.
        "loss": memory(
            copies=kept_root,
            activations=L * between + (4 if sharded else 3) * stream,
            logits=(FLOAT + BF16) * head + 2 * BF16 * min(shape.loss_chunk, T) * config.vocab_size,
        ),
        "backward of the last block": memory(
            gradients=outer,
            copies=kept_root + gathered,
            activations=L * between + again,
            working=backward,
            logits=waiting,
            network=2 * BF16 * sent,
        ),
        "backward of the first block": memory(
            gradients=outer + (L - 1) * block_gradient,
            copies=kept_root + gathered,
            activations=between + again,
            working=backward,
            logits=waiting,
            network=2 * BF16 * sent + (reducing if L > 1 else 0),
        ),
        "optimizer": memory(gradients=every),  # under accumulation: the last pass's, being added up
    }
    if sharded:
        if L > 1:
            found["backward of the block before the last"] = memory(
                gradients=block_gradient,
                copies=kept_root + gathered,
                activations=(L - 1) * between + again,
                working=backward,
                logits=waiting,
                network=2 * BF16 * sent + reducing,
            )
        rows = 2 * BF16 * assignments(config, shape, machine) * config.expert_width
        # The experts' gradients in bfloat16, in float32 on their way to their shards, and there; their rows are gone.
        for name, done in (("last", 0), ("first", L - 1)):
            found[f"reduction of the {name} block"] = memory(
                gradients=done * block_gradient,
                copies=kept_root + BF16 * used.dense,
                activations=(L - done) * between + again - rows,
                working=2 * stream + BF16 * used.experts,
                logits=waiting,
                network=FLOAT * (used.experts + mine.experts),
            )
        found["reduction of embedding and head"] = memory(
            gradients=L * block_gradient, working=BF16 * root, network=FLOAT * (root + mine.embedding + mine.head)
        )
    return found


def peak(config: ModelConfig, shape: TrainShape, machine: Machine) -> tuple[str, Memory]:
    """The moment at which a step needs most memory, and what it needs then."""
    found = moments(config, shape, machine)
    name = max(found, key=lambda moment: found[moment].allocated)
    return name, found[name]
