"""How a model is spread over processes and what of it is recomputed or compiled. The network knows nothing of it.

    experts    rank p of every ``expert_parallel`` neighbours holds E / expert_parallel of them (DTensor Shard(0))
    all else   and what is left of the experts is divided over the other ranks by FSDP2 (fully_shard), block by block

Every rank has sequences of its own. Parameters, gradients and moments are float32 and divided; a block's weights are
gathered in bfloat16 on GPUs just before they are used, gradients are summed in float32. The router's weight and the
experts form units of their own: the router computes in float32, the experts may lie on a smaller mesh.

Legend: W ranks, P = expert_parallel; the mesh is [W / P, P].
"""

from __future__ import annotations

import torch
from torch import nn

from model.errors import ModelError
from model.network.transformer import Block, Transformer
from model.train.config import TrainConfig
from model.train.world import World

COMPUTE = torch.bfloat16  # what products run in on a GPU


def build(config: TrainConfig, model: Transformer, world: World) -> Transformer:
    """A model made on the meta device, spread over the world, allocated and initialised from config.seed.

    The initial weights are the same for every world, but that one GPU's are rounded to bfloat16. ``check`` says before
    whether the ranks fit the model.
    """
    model.recompute = config.activation_checkpointing == "block"
    if world.group is not None:
        _shard(model, config.expert_parallel, world)
    elif world.device.type == "cuda":
        model.compute_in(COMPUTE)  # the optimizer keeps the bits that are missing to float32
    model.to_empty(device=world.device)
    torch.manual_seed(config.seed)
    model.initialize()
    if world.rank:
        torch.manual_seed(config.seed + world.rank)  # noise of its own
    if config.compile and world.device.type == "cuda":
        _compile(model, whole=world.group is None)
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


def _shard(model: Transformer, degree: int, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    kind = world.device.type
    everyone = init_device_mesh(kind, (world.size,), mesh_dim_names=("ranks",))
    mesh = init_device_mesh(kind, (world.size // degree, degree), mesh_dim_names=("shards", "experts"))
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = plain
    if kind == "cuda":
        mixed = MixedPrecisionPolicy(param_dtype=COMPUTE, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shards = world.size // degree

    def place(parameter: nn.Parameter) -> Shard:
        # FSDP divides other dimensions than the first only evenly, and there are few experts to divide.
        even = (d for d in (1, 2) if parameter.dim() == 3 and parameter.shape[d] % shards == 0)
        return Shard(next(even, 0))

    for block in model.blocks:
        assert isinstance(block, Block)
        moe = block.moe
        if degree > 1:
            moe.expert_group = mesh["experts"].get_group()
            for name in ("w1", "v1", "w2"):
                whole = getattr(moe, name)
                setattr(moe, name, nn.Parameter(distribute_tensor(whole, mesh["experts"], [Shard(0)])))
        fully_shard(moe.router, mesh=everyone, mp_policy=plain)
        fully_shard(moe, mesh=mesh["shards"], mp_policy=mixed, shard_placement_fn=place)
        fully_shard(block, mesh=everyone, mp_policy=mixed)
    fully_shard(model, mesh=everyone, mp_policy=mixed)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the whole batch's targets, so gradients are added up and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _compile(model: Transformer, *, whole: bool) -> None:
    """Block by block, so that one compilation serves all; between FSDP's hooks only the parts without any."""
    for block in model.blocks:
        assert isinstance(block, Block)
        if whole:
            block.compile(dynamic=False)
        else:
            block.attention.compile(dynamic=False)
