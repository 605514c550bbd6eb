"""Records a step: every operator with its sizes, in order, and the memory in use, by unit of the model.

The step is the real one (titan_fast.step on a parallelized model); this only watches. With fake tensors it takes a few
milliseconds per layer, whatever the sizes.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from titan_fast.direct_fsdp import DirectAllGather, DirectReduceScatter, direct_units
from titan_fast.memory_count import MemoryCounter, Peak, is_on_device
from titan_fast.wide_products import add_product_, product

Kind = Literal["gemm", "attention", "memory", "gather", "reduce", "replicas", "copy_out", "blocking", "tensor", "wait"]
"""gemm, attention: bound by arithmetic; memory: bound by bandwidth. gather, reduce, replicas (HSDP's sum over its
copies): FSDP's collectives, which overlap with computation; copy_out: the computation needs what was gathered;
blocking: a collective that is waited for at once; tensor, wait: a collective of tensor parallelism, and the place that
needs its result."""


@dataclass(frozen=True)
class Group:
    """Ranks of a collective: `size` of them, `stride` apart."""

    size: int
    stride: int


@dataclass(frozen=True)
class Operation:
    """A kernel, or several of one kind (`kernels`)."""

    kind: Kind
    name: str
    nbytes: float = 0.0
    """Read plus written; for a collective, the whole (gathered or unreduced) buffer."""
    flops: float = 0.0
    shape: tuple[int, int, int] = (0, 0, 0)
    """For a matrix product: rows, columns, inner size."""
    element_size: int = 2
    backward: bool = False
    """For attention."""
    group: Group = Group(1, 1)
    recomputed: bool = False
    compiled: bool = False
    kernels: float = 1.0


@dataclass
class Segment:
    """What happens between two marks: one unit of the model in one phase of one pass."""

    phase: str
    unit: str
    batch: int
    first_event: int
    operations: list[Operation] = field(default_factory=list)
    peak: Peak = field(default_factory=lambda: Peak(0.0, {}))


_ATEN = torch.ops.aten
_WIDE = {one._opoverload.overloadpacket for one in (product, add_product_)}
_GEMMS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.addmm_, _ATEN._scaled_mm} | _WIDE
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: False,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: True,
}
_NO_WORK = {
    _ATEN.empty,
    _ATEN.empty_like,
    _ATEN.empty_strided,
    _ATEN.new_empty,
    _ATEN.new_empty_strided,
    _ATEN.lift_fresh,
}


def operation_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Operation | None:
    """The Operation for a call of an ATen (or other) operator; None for views and mere allocations."""
    packet, namespace = func.overloadpacket, func.namespace
    if packet in _GEMMS:
        return _gemm(packet, args, args[0] if out is None else out)  # `add_product_` returns nothing
    if packet in _ATTENTION:
        return _attention(func.__name__, args, _ATTENTION[packet])
    if namespace in ("c10d", "_c10d_functional", "_dtensor"):
        return _collective(func, args, out)
    if packet in _NO_WORK or namespace in ("prim", "profiler") or func.is_view:
        return None
    nbytes = moved_bytes(func, args, kwargs, out)
    if not nbytes:
        return None
    kind: Kind = "copy_out" if str(func) == "fsdp.split_with_sizes_copy.default" else "memory"
    return Operation(kind, str(packet).removeprefix("aten."), nbytes)


def _gemm(packet: Any, args: tuple, out: Tensor) -> Operation:
    tensors = [a for a in args if isinstance(a, Tensor)]
    left, right = (
        tensors[:2] if packet is _ATEN._scaled_mm else tensors[-2:]
    )  # scales are the last arguments; a tensor that is added to is the first
    rows, columns, inner = left.shape[-2], right.shape[-1], left.shape[-1]
    batch = left.shape[0] if left.dim() == 3 else 1
    shape, size = (rows * batch, columns, inner), left.element_size()
    nbytes = batch * (size * (rows + columns) * inner + out.element_size() * rows * columns)
    return Operation("gemm", packet.__name__, nbytes, 2.0 * batch * rows * columns * inner, shape, size)


def _attention(name: str, args: tuple, backward: bool) -> Operation:
    """Causal attention computes half of the products, and its backward pass 2.5 times as many as the forward."""
    q, k = args[1:3] if backward else args[:2]
    flops = 2.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3] * (2.5 if backward else 1.0)
    return Operation("attention", name, flops=flops, element_size=q.element_size(), backward=backward)


def attention_workspace(args: tuple) -> int:
    """Bytes of the workspace of FlashAttention-2's backward: dq summed in float32, and with grouped queries dk and dv
    of every query head (flash_api.cpp, mha_bwd). The CPU operator used in its place has none."""
    q, k = args[1:3]
    expanded = 2 * q.numel() * q.element_size() if q.shape[1] != k.shape[1] else 0
    return 4 * q.numel() + expanded


def _group_of(group: dist.ProcessGroup) -> Group:
    ranks = dist.get_process_group_ranks(group)
    return Group(len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1)


def _collective(func: Any, args: tuple, out: Any) -> Operation | None:
    name = func.overloadpacket.__name__
    if name == "wait_tensor":
        return Operation("wait", name)
    groups = [a for a in args if isinstance(a, (str, torch.ScriptObject))]
    groups = [a for a in groups if not isinstance(a, str) or a not in ("sum", "max", "avg")]
    if not groups:
        return None
    group = next((found for found in map(_try_group, groups) if found is not None), None)
    if group is None or group.size == 1:
        return None
    largest = max((t.numel() * t.element_size() for t in tree_iter((args, out)) if isinstance(t, Tensor)), default=0)
    kinds: dict[str, Kind] = {"_allgather_base_": "gather", "_reduce_scatter_base_": "reduce", "allreduce_": "blocking"}
    return Operation(kinds.get(name, "tensor"), name, float(largest), group=group)


def _try_group(candidate: Any) -> Group | None:
    """The group that an argument of a collective names or holds; None if it is something else, like a reduction."""
    try:
        if isinstance(candidate, str):
            return _group_of(dist.distributed_c10d._resolve_process_group(candidate))  # type: ignore[arg-type]
        return _group_of(dist.ProcessGroup.unbox(candidate))
    except (RuntimeError, TypeError, ValueError, KeyError):
        return None


def _saves() -> bool:
    """Whether torch.utils.checkpoint's hooks are active: in a backward pass, while it recomputes."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore


def accessed(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor, each counted once: few for an expanded one."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def moved_bytes(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> float:
    """Bytes that an operator reads and writes: its arguments once, what it changes or returns once more."""
    read, written, known = 0, 0, set()
    for argument, value in zip(func._schema.arguments, _in_order(func, args, kwargs), strict=False):
        for tensor in tree_iter(value):
            if is_on_device(tensor):
                changed = argument.alias_info is not None and argument.alias_info.is_write
                written += accessed(tensor) if changed else 0
                only_written = changed and (argument.is_out or func.overloadpacket is _ATEN._foreach_copy_)
                read += 0 if only_written else accessed(tensor)
                known.add(tensor.untyped_storage()._cdata)
    for tensor in tree_iter(out):
        if is_on_device(tensor) and tensor.untyped_storage()._cdata not in known:
            written += accessed(tensor)
    if written == 0:
        return 0.0  # a view
    if func.overloadpacket is _ATEN.embedding:
        read = written  # the rows that are looked up, not the table
    return float(read + written)


def _in_order(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Any]:
    for position, argument in enumerate(func._schema.arguments):
        yield args[position] if position < len(args) else kwargs.get(argument.name)


class StepRecorder(TorchDispatchMode):
    """Enter it around a step; mark where units and phases begin."""

    def __init__(self, for_gpu: bool = True, tensor_degree: int = 1) -> None:
        """for_gpu: count the workspace of the GPU's attention, which the CPU's does not have. tensor_degree: of tensor
        parallelism, whose ranks are neighbours."""
        super().__init__()
        self.for_gpu, self.tensor_degree = for_gpu, tensor_degree
        self.start()

    def start(self) -> None:
        """Forgets what was recorded, and starts recording."""
        self.memory = MemoryCounter()
        self.segments: list[Segment] = []
        self.batch = -1
        self.paused = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Without this, Dynamo would leave every frame under the mode uncompiled."""
        return True

    def mark(self, phase: str, unit: str) -> None:
        """What follows belongs to `unit` in `phase`."""
        if phase == "backward" and self.memory.phase == "forward":
            self.memory.keep()
        self.batch += phase == "forward" and unit == "embedding"
        self.memory.phase, self.memory.unit = phase, unit
        self.segments.append(Segment(phase, unit, max(0, self.batch), len(self.memory.events)))

    def add(self, operation: Operation) -> None:
        if self.segments:
            self.segments[-1].operations.append(operation)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operators on local tensors will be seen
        out = func(*args, **kwargs)
        if not self.paused and func.namespace != "prim":
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        memory = self.memory
        memory.see((args, kwargs))
        memory.see(out)
        if func.namespace in ("fsdp", "c10d"):
            self._label_fsdp(str(func), args, kwargs, out)
        elif func.namespace == "_c10d_functional":
            memory.see((args, out), "collective buffers")
        if self.for_gpu and _ATTENTION.get(func.overloadpacket):
            memory.pulse(attention_workspace(args))
        operation = operation_of(func, args, kwargs, out)
        if operation is not None:
            backward = bool(self.segments and self.segments[-1].phase == "backward")
            of_tensor = operation.group == Group(self.tensor_degree, 1)
            if operation.kind == "blocking" and backward and not of_tensor:
                operation = replace(operation, kind="replicas")
            self.add(replace(operation, recomputed=backward and _saves()))

    def note_collective(self, kind: Kind, whole: list[Tensor], own: list[Tensor], group: dist.ProcessGroup) -> None:
        """A unit's gather into, or reduction of, the `whole` tensors, of which this rank has its `own` shards."""
        if self.paused:
            return
        self.memory.see((whole, own), "collective buffers")
        if kind == "gather":
            self.memory.see(whole, "unsharded parameters")
        if group.size() > 1:
            nbytes = float(sum(tensor.numel() * tensor.element_size() for tensor in whole))
            self.add(Operation(kind, f"direct {kind}", nbytes, group=_group_of(group)))

    def _label_fsdp(self, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        if name == "fsdp.split_with_sizes_copy.default":
            self.memory.see(kwargs["out"], "unsharded parameters")
        elif name == "fsdp.chunk_cat.default":
            self.memory.see(args[0], "gradients")
        self.memory.see((args, kwargs, out), "collective buffers")

    def finish(self) -> list[Segment]:
        """The segments, each with its peak."""
        ends = [segment.first_event for segment in self.segments[1:]] + [len(self.memory.events)]
        for segment, end in zip(self.segments, ends, strict=True):
            segment.peak = self.memory.peak(segment.first_event, end)
        return self.segments


class _NotedAllGather(DirectAllGather):
    """Gathers nothing: fake tensors cannot be gathered in groups."""

    def __init__(self, recorder: StepRecorder) -> None:
        self.recorder = recorder

    def gather_each(self, outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup) -> None:
        self.recorder.note_collective("gather", outputs, inputs, group)


class _NotedReduceScatter(DirectReduceScatter):
    def __init__(self, recorder: StepRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def reduce_each(self, outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup, op: Any) -> None:
        self.recorder.note_collective("reduce", inputs, outputs, group)


def note_direct_collectives(model: nn.Module, recorder: StepRecorder) -> None:
    """Tells `recorder` what `direct_fsdp` gathers and reduces."""
    for module, _ in direct_units(model):
        module.set_custom_all_gather(_NotedAllGather(recorder))
        module.set_custom_reduce_scatter(_NotedReduceScatter(recorder))


class _Mark(torch.autograd.Function):
    """The identity; its backward marks the start of a unit's backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorder: StepRecorder, unit: str) -> Tensor:
        ctx.recorder, ctx.unit = recorder, unit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        segments = ctx.recorder.segments
        if not (segments[-1].phase == "backward" and segments[-1].unit == ctx.unit):
            ctx.recorder.mark("backward", ctx.unit)
        return gradients[0], None, None


def mark_units(model: nn.Module, units: dict[str, nn.Module], recorder: StepRecorder) -> None:
    """Makes every call of a unit mark its forward and, later, its backward pass. The marks are outside of all hooks,
    FSDP's too, whose work then counts as the unit's, and outside of compiled code."""
    for name, unit in units.items():
        unit.__class__ = _marking(type(unit))
        unit.mark_as = recorder, name  # type: ignore[assignment]


@functools.cache
def _marking(kind: type[nn.Module]) -> type[nn.Module]:
    """One class for all units of a kind; otherwise each would be compiled separately."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder, name = self.mark_as
        recorder.mark("forward", name)
        return _marked(kind.__call__(self, *args, **kwargs), recorder, name)

    return type(kind.__name__, (kind,), {"__call__": call})


def _marked(out: Any, recorder: StepRecorder, unit: str) -> Any:
    if isinstance(out, tuple):
        return tuple(_marked(item, recorder, unit) for item in out)
    if isinstance(out, Tensor) and out.requires_grad:
        return _Mark.apply(out, recorder, unit)
    return out


@contextmanager
def recording(recorder: StepRecorder) -> Iterator[None]:
    """To be entered around the step."""
    with recorder.memory.watching_resizes(), _without_trials(recorder), _with_arrivals(recorder), recorder:
        yield


@contextmanager
def _with_arrivals(recorder: StepRecorder) -> Iterator[None]:
    """Records where the computation waits for weights of `direct_fsdp`, which makes no copy that could be seen."""
    arrive = param_group.foreach_all_gather_copy_out

    def noted(result: Any, *others: Any, **options: Any) -> None:
        arrive(result, *others, **options)
        if not result.all_gather_input_split_sizes:
            recorder.add(Operation("copy_out", "arrival", kernels=0.0))

    with mock.patch.object(param_group, "foreach_all_gather_copy_out", noted):
        yield


@contextmanager
def _without_trials(recorder: StepRecorder) -> Iterator[None]:
    """Does not count the fake tensors of global size on which DTensor tries operators out, to learn the shapes of their
    results. No device ever holds them. (With them a sharded optimizer would take 100 GiB.)"""
    name = "_propagate_tensor_meta_non_cached"
    propagate = getattr(ShardingPropagator, name)

    def unseen(*args: Any, **kwargs: Any) -> Any:
        was_paused, recorder.paused = recorder.paused, True
        try:
            return propagate(*args, **kwargs)
        finally:
            recorder.paused = was_paused

    with mock.patch.object(ShardingPropagator, name, unseen):
        yield
