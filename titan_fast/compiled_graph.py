"""Counts what a compiled block does, from the graphs that Dynamo, AOTAutograd and Inductor's partitioner make of it.

What is saved for the backward pass is the partitioner's own choice. What Inductor then fuses is estimated by a rule: a
value gets memory if a matrix product, attention, a collective, an opaque operator or the caller reads it; everything
else is computed inside the kernel that needs it. Kernels between the same two such operators are one if they share
something. benchmarks/results/inductor_bytes.json has the bytes of the code that Inductor really generates.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_iter

from titan_fast.step_record import Operation, StepRecorder, attention_workspace, operation_of

_ATEN = torch.ops.aten
_VIEWS = (_ATEN._unsafe_view.default, _ATEN.alias.default, _ATEN.lift_fresh_copy.default)
_OPAQUE_NAMESPACES = ("titan_kernels", "titan_fast", "_c10d_functional", "c10d")
_OPAQUE = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_mm.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


class Counter:
    """A backend for torch.compile that adds to `recorder` what each call of a graph would do, fused as by Inductor.
    One object serves many steps, so that no graph is traced twice."""

    def __init__(self) -> None:
        self.recorder = StepRecorder()
        self.compile = aot_autograd(
            fw_compiler=functools.partial(_count_graph, self, False),
            bw_compiler=functools.partial(_count_graph, self, True),
            partition_fn=_partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,  # as Inductor: writes in place stay in the graph
        )

    def __call__(self, graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        return self.compile(graph, inputs)


def _partition(graph: GraphModule, inputs: Any, **arguments: Any) -> tuple[GraphModule, GraphModule]:
    """Like Inductor: its passes over the joint graph, then the minimum cut."""
    joint_graph_passes(graph)
    return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **arguments)


def _count_graph(counter: Counter, backward: bool, graph: GraphModule, inputs: Sequence[Any]) -> Any:
    _forget_random_state(graph)
    plan = GraphPlan.of(graph, backward)

    def call(arguments: list[Any]) -> Any:
        taken = list(arguments)
        arguments.clear()
        return _run(counter.recorder, plan, graph, taken)

    call._boxed_call = True  # type: ignore[attr-defined]  # so that AOTAutograd drops its own references
    return call


def _forget_random_state(graph: GraphModule) -> None:
    """The partitioner wraps recomputed attention into operators that keep and restore the CPU's random state, for a
    dropout that there is not. This calls it directly, as on CUDA, where random state is kept outside."""
    for node in list(graph.graph.nodes):
        position = {"run_and_save_rng_state": 0, "run_with_rng_state": 1}.get(str(node.target))
        if node.op != "call_function" or position is None:
            continue
        inner: Any = node.args[position]
        with graph.graph.inserting_before(node):
            plain = graph.graph.call_function(inner, node.args[position + 1 :], node.kwargs)
            values = map_arg((plain.args, plain.kwargs), lambda argument: argument.meta["val"])
            plain.meta = {**node.meta, "val": inner(*values[0], **values[1])}
            if position == 1:
                node.replace_all_uses_with(plain)
            else:  # it returns (state, results); the state goes to the backward graph, which will not use it
                for user in list(node.users):
                    replacement = plain
                    if user.args[1] == 0:
                        replacement = graph.graph.call_function(_ATEN.empty.memory_format, ([0],), {"device": "cpu"})
                        replacement.meta = {"val": torch.empty(0)}
                    user.replace_all_uses_with(replacement)
                    graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()


def _run(recorder: StepRecorder, plan: "GraphPlan", graph: GraphModule, arguments: list[Any]) -> Any:
    memory = recorder.memory
    if recorder.paused:
        return graph(*arguments)
    memory.see(arguments)
    addresses = {
        position: value.untyped_storage()._cdata
        for position, value in enumerate(arguments)
        if isinstance(value, Tensor)
    }
    position_of_pulse = len(memory.events)
    recorder.paused = True
    try:
        outputs = graph(*arguments)
    finally:
        recorder.paused = False
    arguments.clear()
    ended = {position for position, address in addresses.items() if not memory.is_alive(address)}
    memory.pulse(plan.highest(ended), at=position_of_pulse)
    memory.see(outputs)
    for operation in plan.operations:
        recorder.add(operation)
    return outputs


@dataclass
class _Kernel:
    """Fused nodes. It reads and writes nodes that have memory."""

    depth: int
    numel: int
    reads: set[Node] = field(default_factory=set)
    writes: set[Node] = field(default_factory=set)
    recomputed: bool = False


@dataclass(frozen=True)
class GraphPlan:
    """The kernels of a graph, and the memory it needs."""

    operations: list[Operation]
    steps: list[tuple[int, tuple[int, ...]]]
    """In order: the bytes that a node needs, and the indices of the graph inputs that it is the last to use."""
    frees: list[int]
    """After each of the steps, the bytes of the graph's own values that are freed."""
    input_bytes: dict[int, int]

    def highest(self, ended: set[int]) -> int:
        """The peak in bytes above the start, if the inputs in `ended` are freed after their last use."""
        total = highest = 0
        for (taken, inputs), freed in zip(self.steps, self.frees, strict=True):
            total += taken
            highest = max(highest, total)
            total -= freed + sum(self.input_bytes[i] for i in inputs if i in ended)
        return highest

    @classmethod
    def of(cls, graph: GraphModule, backward: bool) -> "GraphPlan":
        analysis = _Analysis(graph, backward)
        return cls(analysis.operations(), *analysis.lifetimes())


class _Analysis:
    def __init__(self, graph: GraphModule, backward: bool) -> None:
        self.nodes = list(graph.graph.nodes)
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.outputs = {_base(n) for n in tree_iter(self.nodes[-1].args) if isinstance(n, Node)}
        self.calls = [node for node in self.nodes if node.op == "call_function" and not _is_view(node)]
        self.opaque = {node for node in self.calls if _is_opaque(node)}
        self.barriers = {node for node in self.calls if _is_largest_of_rows(node)}
        read_by_opaque = {_base(source) for node in self.opaque for source in node.all_input_nodes}
        self.kept = {node for node in self.calls if node in read_by_opaque | self.outputs and _nbytes(node)}
        self.kept |= {node for node in self.nodes if _is_result_of(node, self.opaque)} | self.opaque | self.barriers
        self.kept |= {node for node in self.calls if _writes_to_input(node)}
        self.from_gradient = self._reached_from_gradients() if backward else set(self.nodes)

    def _reached_from_gradients(self) -> set[Node]:
        """The nodes that depend on incoming gradients; the rest of a backward graph is recomputation."""
        reached = {node for node in self.inputs if node.name.startswith("tangents")}
        for node in self.nodes:
            if any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        return reached

    def operations(self) -> list[Operation]:
        """Opaque operators as they are, and the rest as fused kernels, each at the place of its first result."""
        depths = self._depths()
        kernels: list[_Kernel] = []
        order: list[tuple[Node, _Kernel | None]] = []
        for node in self.calls:
            if node in self.opaque:
                order.append((node, None))
            elif node in self.kept:
                kernel = self._fuse(node, depths, kernels)
                if kernel not in [entry[1] for entry in order]:
                    order.append((node, kernel))
        found = []
        for node, kernel in order:
            operation = self._opaque_operation(node) if kernel is None else _fused_operation(kernel)
            if operation is not None:
                found.append(operation)
        return found

    def _opaque_operation(self, node: Node) -> Operation | None:
        values = [_value(a) for a in node.args], {name: _value(a) for name, a in node.kwargs.items()}
        operation = operation_of(node.target, tuple(values[0]), values[1], node.meta.get("val"))
        if operation is None:
            return None
        return replace(operation, compiled=True, recomputed=node not in self.from_gradient)

    def _depths(self) -> dict[Node, int]:
        """For each node the longest chain of opaque operators and barriers that ends with it."""
        depths: dict[Node, int] = {}
        for node in self.nodes:
            above = max((depths[source] for source in node.all_input_nodes), default=0)
            depths[node] = above + (node in self.opaque or node in self.barriers)
        return depths

    def _fuse(self, node: Node, depths: dict[Node, int], kernels: list[_Kernel]) -> _Kernel:
        """The kernel that makes `node`: an earlier one of equal depth and size that shares something, or a new one."""
        reads = self._reads(node)
        numel = max((_numel(source) for source in reads | {node}), default=0)
        depth = depths[node] - (node in self.barriers)  # a barrier can be fused with its inputs, not with its users
        fresh = _Kernel(depth, numel, reads, {node}, node not in self.from_gradient)
        for kernel in kernels:
            shares = kernel.reads & reads or kernel.writes & reads
            if kernel.depth == fresh.depth and kernel.numel == numel and shares:
                kernel.reads |= reads
                kernel.writes.add(node)
                return kernel
        kernels.append(fresh)
        return fresh

    def _reads(self, node: Node) -> set[Node]:
        """The values with memory from which `node` is computed."""
        found: set[Node] = set()
        seen: set[Node] = set()
        sources = node.all_input_nodes[1:] if _writes_to_input(node) else node.all_input_nodes
        pending = [_base(source) for source in sources]
        while pending:
            source = pending.pop()
            if source in seen:
                continue
            seen.add(source)
            if source in self.kept or source.op == "placeholder":
                found.add(source)
            else:
                pending += [_base(above) for above in source.all_input_nodes]
        return found

    def lifetimes(self) -> tuple[list[tuple[int, tuple[int, ...]]], list[int], dict[int, int]]:
        """GraphPlan's steps, frees and input_bytes. A kernel's inputs live until its result is made."""
        last: dict[Node, int] = {}
        made = [node for node in self.calls if node in self.kept]
        for position, node in enumerate(made):
            for source in self._reads(node) if node not in self.opaque else map(_base, node.all_input_nodes):
                last[_owner(source)] = position
        numbers = {node: position for position, node in enumerate(self.inputs)}
        steps, frees = [], []
        for position, node in enumerate(made):
            ending = [source for source, at in last.items() if at == position]
            inputs = tuple(numbers[source] for source in ending if source in numbers)
            own = sum(_nbytes(source) for source in ending if source not in numbers and source not in self.outputs)
            workspace = _workspace(node)
            steps.append(((0 if _writes_to_input(node) else _nbytes(node)) + workspace, inputs))
            frees.append(own + workspace)
        return steps, frees, {numbers[node]: _nbytes(node) for node in self.inputs}


def _fused_operation(kernel: _Kernel) -> Operation:
    inside = kernel.writes & kernel.reads
    nbytes = sum(_nbytes(node) for node in kernel.reads - inside) + sum(_nbytes(node) for node in kernel.writes)
    return Operation("memory", "fused", float(nbytes), recomputed=kernel.recomputed, compiled=True)


def _workspace(node: Node) -> int:
    if node.target is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return attention_workspace(tuple(_value(argument) for argument in node.args))
    return 0


def _is_opaque(node: Node) -> bool:
    target = node.target
    return target in _OPAQUE or (isinstance(target, torch._ops.OpOverload) and target.namespace in _OPAQUE_NAMESPACES)


def _is_largest_of_rows(node: Node) -> bool:
    """Whether this is a maximum over several rows, such as float8's scales need. A kernel that uses it has to wait for
    it, and recomputes its input. A maximum within a row is fused with its users."""
    if node.target is not _ATEN.amax.default:
        return False
    x = _value(node.args[0])
    dims = [dim % x.dim() for dim in node.args[1]] if len(node.args) > 1 else []  # type: ignore[union-attr]
    return any(x.stride(dim) != 1 and x.shape[dim] > 1 for dim in dims or range(x.dim()))


def _is_result_of(node: Node, producers: set[Node]) -> bool:
    return node.target is operator.getitem and node.args[0] in producers


def _writes_to_input(node: Node) -> bool:
    """Whether the result goes into the memory of one of the graph's inputs."""
    return node.target is _ATEN.copy_.default and node.args[0].op == "placeholder"  # type: ignore[union-attr]


def _is_view(node: Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target in _VIEWS)


def _base(node: Node) -> Node:
    """The node whose memory `node` is a view of. One of several results of an operator is its own."""
    while node.op == "call_function" and _is_view(node):
        if _is_result_of(node, {node.args[0]}) and not _is_view(node.args[0]):  # type: ignore[arg-type]
            break
        node = node.all_input_nodes[0]
    return node


def _owner(node: Node) -> Node:
    """The call that made `node`."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, Node) else argument


def _nbytes(node: Node) -> int:
    return sum(v.numel() * v.element_size() for v in tree_iter(node.meta.get("val")) if isinstance(v, Tensor))


def _numel(node: Node) -> int:
    return max((v.numel() for v in tree_iter(node.meta.get("val")) if isinstance(v, Tensor)), default=0)
