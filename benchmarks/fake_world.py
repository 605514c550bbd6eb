"""Rank 0 of many on one device: the real work of one GPU of a large FSDP2 job, without its communication.

The process group is torch's fake one, which claims any number of ranks. Its collectives differ between versions (torch
2.11's reduce-scatter leaves its output unwritten), so FSDP2 gets two of our own that move real data: an all-gather
copies the rank's own shard into every slot, a reduce-scatter takes its own chunk. So gathered weights are random
numbers, which matters: on zeros a GPU draws less power, and clocks higher.

Such a step lacks the network and the wait for it. It does little more than a real one: this GPU copies its shard into
the other slots, which in a real one the network writes. The copy occupies some multiprocessors for a while, as NCCL's
kernels do; a plain copy occupies all of them, and delayed the computation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor

from titan_fast.direct_fsdp import DirectAllGather, DirectReduceScatter, direct_units
from titan_fast.distributed import World

MULTIPROCESSORS = 16
"""How many a gather occupies: as many as NCCL's kernels with 16 channels."""
BLOCK = 8192


@triton.jit
def _fill(SLOTS, SHARD, n, slots, BLOCK: tl.constexpr):
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(SHARD + at, mask=at < n)
        place = SLOTS + at
        for _ in range(slots):
            tl.store(place, values, mask=at < n)
            place += n


def fill_slots(slots: Tensor, shard: Tensor) -> None:
    """Copies `shard` [n] to every row of `slots` [k, n], contiguous, of the same dtype and device."""
    if shard.device.type == "cuda":
        launch_fill(slots, shard)
    else:
        slots.copy_(shard.expand_as(slots))


def launch_fill(slots: Tensor, shard: Tensor) -> None:
    """`fill_slots` by the kernel."""
    kernel: Any = _fill[(MULTIPROCESSORS,)]
    kernel(slots, shard, shard.numel(), slots.shape[0], BLOCK=BLOCK, num_warps=16)


class _Buffers:
    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class CopyToAll(_Buffers, AllGather):
    """An all-gather in which every rank's shard is this rank's own."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        slots = output_tensor.view(group.size(), -1)
        own = group.rank()  # already in its slot: FSDP2 gathers in place
        fill_slots(slots[:own], input_tensor)
        fill_slots(slots[own + 1 :], input_tensor)
        if slots[own].data_ptr() != input_tensor.data_ptr():
            slots[own].copy_(input_tensor)


class TakeOwn(_Buffers, ReduceScatter):
    """A reduce-scatter in which the sum over ranks is this rank's own gradient."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])


@contextmanager
def fake_world(size: int, device: torch.device) -> Iterator[World]:
    """Rank 0 of `size`; collectives other than FSDP2's leave their input unchanged."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the "fake" backend

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(0, size, device)
    finally:
        dist.destroy_process_group()


class CopyEachToAll(DirectAllGather):
    """Like `CopyToAll`, for every weight separately."""

    def gather_each(self, outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup) -> None:
        for output, shard in zip(outputs, inputs, strict=True):
            fill_slots(output.view(group.size(), -1), shard)


class TakeOwnOfEach(DirectReduceScatter):
    """Like `TakeOwn`, for every gradient separately."""

    def reduce_each(self, outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup, op: Any) -> None:
        torch._foreach_copy_(outputs, [one.view(group.size(), -1)[group.rank()] for one in inputs])


def use_copies(model: nn.Module) -> None:
    """Gives every FSDP2 unit of `model` the above collectives of its kind."""
    direct = {module for module, _ in direct_units(model)}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(CopyEachToAll() if module in direct else CopyToAll())
            module.set_custom_reduce_scatter(TakeOwnOfEach() if module in direct else TakeOwn())


def assert_gathers_real_weights(model: nn.Module) -> None:
    """Asserts that all matrices that the FSDP2 units of `model` gather are whole, finite, and random in every part."""
    for unit in model.modules():
        if not isinstance(unit, FSDPModule):
            continue
        shards = {
            name: parameter.to_local()
            for name, parameter in unit.named_parameters()
            if isinstance(parameter, DTensor) and parameter.dim() == 2
        }
        unit.unshard()
        for name, parameter in unit.named_parameters():
            if name not in shards or isinstance(parameter, DTensor):
                continue  # it belongs to a unit within this one
            weight, shard = parameter.detach().float(), shards[name].to(parameter.dtype).float()
            parts = weight[: len(weight) // len(shard) * len(shard)].unflatten(0, (-1, len(shard)))
            spread = parts.flatten(1).std(dim=1)
            assert torch.isfinite(spread).all() and (spread > 0.5 * shard.std()).all(), f"{name} is not random"
            assert all(torch.equal(part, shard) for part in (parts[0], parts[-1])), f"{name} is not the own shard"
        unit.reshard()


def assert_reduces_real_gradients(model: nn.Module) -> None:
    """Asserts that every matrix has a finite nonzero gradient; to be called after a backward pass."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if gradient.numel() and "embedding" not in name:  # most tokens are not in a batch
            assert torch.isfinite(gradient).all() and gradient.any(), f"the gradient of {name} is zero or not finite"
