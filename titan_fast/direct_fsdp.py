"""FSDP2 without its copies: every weight is gathered right into its place, and every gradient that has the reduction's
dtype is reduced from its place.

FSDP2 by itself gathers the weights of a unit into one buffer, ordered by rank, and copies them out of it weight by
weight. Gradients it copies into one buffer, with a kernel that reaches half of the memory's bandwidth. The computation
waits for both. Here each weight has a collective of its own, and those of a unit go to the backend as one group, which
NCCL runs as one kernel, so small weights cost nothing extra. Ranks hold consecutive rows of a weight, so what arrives
is the weight.

This replaces three functions of FSDP2 that are not public; `unsupported` compares them with those of torch 2.11 to
2.15. Units that use FSDP2's own collectives work as before."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import AllgatherOptions, ReduceScatterOptions
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

from titan_fast.errors import CommunicationError

_EXCHANGED = {
    "foreach_all_gather": (
        "fsdp_params", "group", "async_op", "all_gather_copy_in_stream", "all_gather_stream", "device",
        "all_gather_comm",
    ),
    "foreach_all_gather_copy_out": ("all_gather_result", "fsdp_params", "group"),
    "foreach_reduce_scatter_copy_in": ("unsharded_grads", "reduce_scatter_input", "world_size"),
}  # fmt: skip
_USED = ("_get_param_all_gather_inputs", "_get_dim0_padded_size", "_get_device_handle", "AllGatherResult")
_flat: dict[str, Any] = {name: getattr(collectives, name, None) for name in _EXCHANGED}


def unsupported() -> str:
    """Why this torch's FSDP2 cannot be changed in this way; "" if it can."""
    for name, parameters in _EXCHANGED.items():
        if _flat[name] is None or _parameters(_flat[name]) != parameters:
            return f"torch {torch.__version__} has another FSDP2: {name} is not the function that is known"
    missing = [name for name in _USED if not hasattr(collectives, name)]
    return f"torch {torch.__version__} has another FSDP2, without {missing[0]}" if missing else ""


def _parameters(function: Any) -> tuple[str, ...]:
    """Names of the parameters, without one with a default that torch 2.15 added for FSDP2's own way."""
    found = inspect.signature(function).parameters.values()
    return tuple(one.name for one in found if one.name != "all_gather_output_fn")


class DirectAllGather(collectives.DefaultAllGather):
    """FSDP2's `AllGather` of a unit whose weights are gathered one by one."""

    def gather_each(self, outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup) -> None:
        """Fills outputs[i], [ranks * n_i], with all ranks' inputs[i], [n_i], in order of rank. On the current
        stream."""
        options = AllgatherOptions()
        options.asyncOp = False
        _finish(group.allgather_into_tensor_coalesced(outputs, inputs, options))


class DirectReduceScatter(collectives.DefaultReduceScatter):
    """FSDP2's `ReduceScatter` of a unit whose gradients are reduced one by one.

    FSDP2 asks for memory for the input, lets `_copy_in` fill it, and asks for memory for the output. The input it gets
    here is a stand-in with a single element of memory, which holds the gradients in its attribute `parts`."""

    def __init__(self) -> None:
        super().__init__()
        self._is_filled = False

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._is_filled = not self._is_filled
        if not self._is_filled:
            return super().allocate(size, dtype=dtype, device=device)
        stand_in = super().allocate((1,), dtype=dtype, device=device).expand(size)
        stand_in.parts = []  # type: ignore[attr-defined]
        return stand_in

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        parts: list[Tensor] = input_tensor.parts  # type: ignore[attr-defined]
        outputs = output_tensor.split([part.numel() // group.size() for part in parts])
        self.reduce_each(list(outputs), parts, group, op)

    def reduce_each(self, outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup, op: Any) -> None:
        """Fills outputs[i], [n_i], with this rank's part of the sum over ranks of inputs[i], [ranks * n_i]. On the
        current stream."""
        options = ReduceScatterOptions()
        options.reduceOp, options.asyncOp = op, False
        _finish(group.reduce_scatter_tensor_coalesced(outputs, inputs, options))


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def use(model: nn.Module, direct: bool) -> None:
    """Makes every FSDP2 unit of `model` that is sharded over several ranks gather and reduce in this way, or in FSDP2's
    own. RuntimeError if direct is asked for and torch is `unsupported`."""
    if direct and (problem := unsupported()):
        raise RuntimeError(problem)
    if direct:
        for name, function in (("foreach_all_gather", _gather), ("foreach_all_gather_copy_out", _arrive)):
            setattr(param_group, name, function)
        collectives.foreach_reduce_scatter_copy_in = _copy_in
    for module in model.modules():
        if isinstance(module, FSDPModule):
            shared = direct and _ranks_of(module) > 1
            module.set_custom_all_gather(DirectAllGather() if shared else collectives.DefaultAllGather())
            module.set_custom_reduce_scatter(DirectReduceScatter() if shared else collectives.DefaultReduceScatter())


def _ranks_of(module: FSDPModule) -> int:
    """Over how many ranks a unit's weights are sharded; 0 where it has none of its own."""
    unit: Any = module._get_fsdp_state()._fsdp_param_group
    return 0 if unit is None else unit._all_gather_process_group.size()


def direct_units(model: nn.Module) -> Iterator[tuple[FSDPModule, Any]]:
    """(module, FSDP2's record of it) for every unit of `model` that gathers and reduces in this way."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            unit = module._get_fsdp_state()._fsdp_param_group
            if unit is not None and isinstance(unit._all_gather_comm, DirectAllGather):
                yield module, unit


def check(model: nn.Module, device: torch.device) -> None:
    """CommunicationError where the backend's grouped collectives give wrong results on known numbers. Every rank calls
    it; it does nothing where no unit gathers in this way."""
    for group in {unit._all_gather_process_group for _, unit in direct_units(model)}:
        if group.size() == 1:
            continue
        try:
            right = _numbers_are_right(group, device)
        except RuntimeError as error:
            raise CommunicationError(f"grouped collectives of {group.size()} ranks fail: {error}", _HINT) from error
        if not right:
            raise CommunicationError(f"grouped collectives of {group.size()} ranks give wrong numbers", _HINT)


_HINT = "use --parallelism.fsdp_buffers flat, which sends everything in one piece, or another version of NCCL"


def _numbers_are_right(group: dist.ProcessGroup, device: torch.device) -> bool:
    size, rank = group.size(), group.rank()
    lengths = (1000, 1, 3)  # as in a unit: few are large

    def known(n: int, of_rank: int) -> Tensor:  # small enough for float32 to add up 60,000 ranks without rounding
        return ((torch.arange(n, device=device) + 10 * of_rank) % 251).float()

    own = [known(n, rank) for n in lengths]
    wanted = [torch.cat([known(n, r) for r in range(size)]) for n in lengths]
    gathered = [torch.zeros_like(whole) for whole in wanted]
    DirectAllGather().gather_each(gathered, own, group)
    reduced = [torch.zeros_like(part) for part in own]
    DirectReduceScatter().reduce_each(reduced, wanted, group, dist.ReduceOp.SUM)
    sums = [size * part for part in own]
    return all(map(torch.equal, gathered + reduced, wanted + sums))


@torch.no_grad()
def _gather(
    fsdp_params: list[Any],
    group: dist.ProcessGroup,
    async_op: bool,
    all_gather_copy_in_stream: Any,
    all_gather_stream: Any,
    device: torch.device,
    all_gather_comm: Any,
) -> Any:
    """Begins to gather a unit's weights. Their memory is allocated and freed on the current stream, so the gather waits
    until that stream has reached this point."""
    streams = (all_gather_copy_in_stream, all_gather_stream)
    if not isinstance(all_gather_comm, DirectAllGather):
        return _flat["foreach_all_gather"](fsdp_params, group, async_op, *streams, device, all_gather_comm)
    handle: Any = collectives._get_device_handle(device.type)
    with handle.stream(all_gather_copy_in_stream):
        shards = [shard for shards in collectives._get_param_all_gather_inputs(fsdp_params) for shard in shards]
    outputs = []
    for parameter, shard in zip(fsdp_params, shards, strict=True):
        parameter.init_all_gather_outputs([shard.numel()], [shard.dtype], group.size(), device)
        parameter.alloc_all_gather_outputs()
        outputs += parameter.all_gather_outputs
    all_gather_stream.wait_stream(all_gather_copy_in_stream)
    all_gather_stream.wait_stream(handle.current_stream())
    with handle.stream(all_gather_stream), torch.autograd._unsafe_preserve_version_counter(_counted(outputs)):
        all_gather_comm.gather_each(outputs, shards, group)
        event = all_gather_stream.record_event()
    # FSDP2 keeps this result until the computation needs the weights, and the shards must live until then.
    kept: Any = shards
    return collectives.AllGatherResult(kept, event, None, [], [], [])


def _counted(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The tensors whose changes autograd counts."""
    return tuple(tensor for tensor in tensors if not tensor.is_inference())


def _arrive(all_gather_result: Any, fsdp_params: list[Any], group: dist.ProcessGroup, **options: Any) -> None:
    """Makes the computation wait for what `_gather` began. options: for FSDP2's own way."""
    if all_gather_result.all_gather_input_split_sizes:
        _flat["foreach_all_gather_copy_out"](all_gather_result, fsdp_params, group, **options)
        return
    handle: Any = collectives._get_device_handle(all_gather_result.all_gather_output[0].device.type)
    handle.current_stream().wait_event(all_gather_result.all_gather_event)


def _copy_in(unsharded_grads: list[Tensor], reduce_scatter_input: Tensor, world_size: int) -> None:
    """Fills `parts` with the gradients to be reduced: flat, in the buffer's dtype, padded with zeros to a multiple of
    the ranks. A gradient that is like that already is taken as it is; the others are copied into one new buffer."""
    parts = getattr(reduce_scatter_input, "parts", None)
    if parts is None:
        _flat["foreach_reduce_scatter_copy_in"](unsharded_grads, reduce_scatter_input, world_size)
        return
    dtype, places, copied = reduce_scatter_input.dtype, [], []
    sizes = [collectives._get_dim0_padded_size(grad.size(), world_size).numel() for grad in unsharded_grads]
    ready = [grad.dtype == dtype and grad.numel() == n for grad, n in zip(unsharded_grads, sizes, strict=True)]
    lacking = [size for size, is_ready in zip(sizes, ready, strict=True) if not is_ready]
    buffer = torch.empty(sum(lacking), dtype=dtype, device=reduce_scatter_input.device)
    free = iter(buffer.split(lacking) if lacking else ())
    for grad, is_ready in zip(unsharded_grads, ready, strict=True):
        parts.append(grad.reshape(-1) if is_ready else next(free))
        if not is_ready:
            parts[-1][grad.numel() :].zero_()
            places.append(parts[-1][: grad.numel()].view(grad.shape))
            copied.append(grad)
    if copied:
        torch._foreach_copy_(places, copied)
