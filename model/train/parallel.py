"""How a model is spread over processes and what of it is recomputed or compiled. The network knows nothing of it.

    experts    rank p of every ``expert_parallel`` neighbours holds E / expert_parallel of them (DTensor Shard(0))
    all else   and what is left of the experts is divided over the other ranks by FSDP2 (fully_shard), block by block

Every rank has sequences of its own. Matrices are divided, with their gradients and moments: on GPUs they are
bfloat16, as on one, with the bits that are missing to float32 in the optimizer (kernels/adamw.py), and are gathered
just before a block uses them; gradients are summed in float32 and then, as one GPU's are, bfloat16. Shared experts
form a unit of their own, as they lie on a smaller mesh. Norms and routers are whole on every rank: they are small,
and as they compute in float32 they would need units of their own, each of which costs the host a millisecond a step
and more.

Legend: W ranks, P = expert_parallel; the mesh is [W / P, P].
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import nn

from kernels.backend import leave_multiprocessors
from model.errors import ModelError
from model.network.transformer import Block, Transformer, computes
from model.train.config import TrainConfig
from model.train.world import World

COMPUTE = torch.bfloat16  # what products run in on a GPU
BESIDE = 16  # multiprocessors, of an H100's or H200's 132


def build(config: TrainConfig, model: Transformer, world: World) -> Transformer:
    """A model made on the meta device, spread over the world, allocated and initialised from config.seed.

    The initial weights are the same for every world, but that GPUs' are rounded to bfloat16. ``check`` says before
    whether the ranks fit the model.
    """
    model.recompute = config.activation_checkpointing == "block"
    _make_room(world.device.type == "cuda" and world.group is not None and config.expert_parallel == 1)
    if world.device.type == "cuda":
        model.compute_in(COMPUTE)  # the optimizer keeps the bits that are missing to float32
    if world.group is not None:
        _shard(model, config, world)
    model.to_empty(device=world.device)
    torch.manual_seed(config.seed)
    model.initialize()
    if world.rank:
        torch.manual_seed(config.seed + world.rank)  # noise of its own
    if config.compile and world.device.type == "cuda":
        _compile(model, config.expert_parallel)
    return model


def check(config: TrainConfig, experts: int, size: int) -> None:
    """Errors: ModelError (2) where ``size`` ranks cannot train with these settings."""
    degree = config.expert_parallel
    if size % degree:
        raise ModelError(f"{size} processes cannot form groups of expert_parallel {degree}; choose a divisor.", 2)
    if experts % degree:
        raise ModelError(f"{experts} experts cannot be shared by expert_parallel {degree} ranks; choose a divisor.", 2)
    if config.global_batch_size % size:
        raise ModelError(
            f"global_batch_size {config.global_batch_size} is no multiple of the {size} processes; change one.", 2
        )


def _make_room(beside: bool) -> None:
    """Leave multiprocessors to NCCL, where it gathers and reduces beside the products, and let it take no more of them.

    Who sets NCCL_MAX_CTAS decides how many it takes, and by that nothing about what is left to it.
    """
    leave_multiprocessors(BESIDE if beside else 0)
    if beside:
        os.environ.setdefault("NCCL_MAX_CTAS", str(BESIDE))  # read when it makes its first communicator


def _shard(model: Transformer, config: TrainConfig, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    kind, degree = world.device.type, config.expert_parallel
    everyone = init_device_mesh(kind, (world.size,), mesh_dim_names=("ranks",))
    mesh = init_device_mesh(kind, (world.size // degree, degree), mesh_dim_names=("shards", "experts"))
    mixed = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    shards = world.size // degree

    def place(parameter: nn.Parameter) -> Shard:
        # There may be fewer experts than ranks. FSDP divides other dimensions than the first only evenly, and copies
        # once more where it does.
        first = (0,) if degree == 1 else ()
        even = (d for d in (*first, 1, 2) if parameter.dim() == 3 and parameter.shape[d] % shards == 0)
        return Shard(next(even, 0))

    apart = {parameter for name, parameter in model.named_parameters() if not computes(name, parameter)}
    for block in model.blocks:
        assert isinstance(block, Block)
        moe = block.moe
        if degree > 1:
            moe.expert_group = mesh["experts"].get_group()
            moe.expert_chunks = config.expert_parallel_chunks
            for name in ("w1", "v1", "w2"):
                whole = getattr(moe, name)
                setattr(moe, name, nn.Parameter(distribute_tensor(whole, mesh["experts"], [Shard(0)])))
            fully_shard(moe, mesh=mesh["shards"], mp_policy=mixed, shard_placement_fn=place, ignored_params=apart)
        fully_shard(block, mesh=everyone, mp_policy=mixed, shard_placement_fn=place, ignored_params=apart)
    fully_shard(model, mesh=everyone, mp_policy=mixed, ignored_params=apart)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the whole batch's targets, so gradients are added up and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _compile(model: Transformer, degree: int) -> None:
    """Block by block, so that one compilation serves all: the functions that FSDP's hooks are around, not the hooks."""
    compiled = partial(torch.compile, dynamic=False)
    for block in model.blocks:
        assert isinstance(block, Block)
        if degree == 1:
            block.forward = compiled(block.forward)  # type: ignore[method-assign]
        else:
            block.attend = compiled(block.attend)  # type: ignore[method-assign]
            block.add = compiled(block.add)  # type: ignore[method-assign]
            block.moe.router.forward = compiled(block.moe.router.forward)  # type: ignore[method-assign]
