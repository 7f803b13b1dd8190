"""A tensor that may be divided over processes (DTensor), seen alike whether it is or not.

torch.distributed.tensor is imported only where a tensor is divided: it takes seconds that one process need not wait.
"""

from __future__ import annotations

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """Of a distributed tensor this rank's part, sharing its memory; another tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def is_divided(tensor: Tensor) -> bool:
    """Whether this rank has a part of it, and no other way to be whole than by the others'."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of it; every rank that has a part calls it."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def place(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank has."""
    if not is_divided(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    # What torch.distributed.checkpoint asks of a tensor.
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """A local tensor as the part of a distributed one that ``tensor``'s own local part is."""
    if not is_divided(tensor):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a tensor, or into this rank's part of a distributed one."""
    local_part(tensor).copy_(value[place(tensor)])
