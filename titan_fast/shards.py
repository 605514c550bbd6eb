"""This rank's part of a tensor that may be sharded over several."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """A DTensor's local part; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def window(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part is in the whole, for any sharding, even or uneven."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, length) for length in tensor.shape)
    lengths, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))


def copy_shard(into: Tensor, whole: Tensor) -> None:
    """Copies this rank's part of `whole` into `into`. No communication."""
    local(into).copy_(whole[window(into)])


def copies(tensor: Tensor) -> int:
    """How many ranks of the world hold these same values."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(tensor, DTensor):
        return world_size
    sharded_over = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not isinstance(placement, Partial), "a sum over ranks that was not taken yet has no copies"
        if not isinstance(placement, Replicate):
            sharded_over *= size
    return world_size // sharded_over
