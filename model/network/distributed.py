"""A tensor that may be divided over processes (DTensor), seen alike whether it is or not.

torch.distributed.tensor is imported only where a tensor is divided: it takes seconds that one process need not wait.
"""

from __future__ import annotations

from torch import Tensor


def local_part(tensor: Tensor) -> Tensor:
    """Of a distributed tensor this rank's part, sharing its memory; another tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def assign(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a tensor, or into this rank's part of a distributed one."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(tensor, DTensor)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    local_part(tensor).copy_(local_part(whole))
