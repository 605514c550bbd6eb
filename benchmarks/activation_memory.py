"""What a block keeps for its backward pass and what it recomputes, for every kind of activation checkpointing.

    python -m benchmarks.activation_memory [--tokens 8192] [--out benchmarks/results/activation_memory.json]

Needs no GPU and no arithmetic: eager blocks run on fake tensors, compiled ones are traced and partitioned by the
compiler, and tensors and matrix products are counted. Bytes are of one block in bfloat16, batch 1, without its weights.
If selective_ac_option is a number N, every Nth block is as with `full` and the others as with `none`.
"""

import argparse
import json
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.provenance import commit
from titan_fast import activation_checkpoint
from titan_fast.config import ActivationCheckpoint, Compile
from titan_fast.flavors import FLAVORS, ModelShape
from titan_fast.model import Block, Llama
from titan_fast.ops import REFERENCE

MODES: dict[str, ActivationCheckpoint] = {
    "none": ActivationCheckpoint(),
    "full": ActivationCheckpoint("full"),
    "selective op": ActivationCheckpoint("selective", "op"),
    "selective attention": ActivationCheckpoint("selective", "attention"),
    "pointwise": ActivationCheckpoint("pointwise"),
    "memory_budget 0.5": ActivationCheckpoint("memory_budget", memory_budget=0.5),
}
_aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """One block, one forward and backward pass. None: not measured this way."""

    kept: int
    """Bytes that live from its forward to its backward pass, including its input."""
    peak: int | None
    """The most bytes at once in the backward pass, including what is kept and recomputed, and the gradients of
    activations and weights."""
    forward_flops: int
    """Of the forward pass's matrix products and attention."""
    recomputed_products: float
    """The fraction of the forward pass's matrix product FLOPs (without attention) that is recomputed."""
    recomputed_attention: bool


class Meter(TorchDispatchMode):
    """Counts bytes of tensors that are made, and FLOPs of matrix products and attention's forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = self.products = self.attentions = self.attention_flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (_aten.mm.default, _aten.addmm.default):
            left, right = args[-2:]
            self.products += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif function in activation_checkpoint._ATTENTION:
            batch, heads, seq_len, head_dim = args[0].shape
            self.attentions += 1
            self.attention_flops += 4 * batch * heads * seq_len * seq_len * head_dim // 2  # half of it is masked
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.peak = max(self.peak, sum(self.live.values()))
            weakref.finalize(storage, self.live.pop, key, None)


def _block(shape: ModelShape, mode: ActivationCheckpoint, compiles: Compile) -> Block:
    """A block in bfloat16 with `mode` applied."""
    with torch.device("meta"):
        block = Block(shape, REFERENCE).to(torch.bfloat16)
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    activation_checkpoint.apply(cast(Llama, model), mode, compiles)
    return block


def _tables(shape: ModelShape, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.empty(tokens, shape.head_dim // 2), torch.empty(tokens, shape.head_dim // 2)


def eager(shape: ModelShape, mode: ActivationCheckpoint, tokens: int) -> Cost:
    """The block as PyTorch runs it, operator by operator."""
    block = _block(shape, mode, Compile())
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device="cpu")
        rope = _tables(shape, tokens)
        x = torch.empty(1, tokens, shape.dim, dtype=torch.bfloat16, requires_grad=True)
        with Meter() as meter:
            for tensor in (*block.parameters(), *rope):
                meter.live[tensor.untyped_storage()._cdata] = 0
            meter._count(x.untyped_storage())
            y, _ = block(x, None, rope)
            products, flops = meter.products, meter.products + meter.attention_flops
            kept = sum(meter.live.values()) - y.untyped_storage().nbytes()
            attentions = meter.attentions
            gradient = torch.empty_like(y)
            y.backward(gradient)
        again = meter.products - 3 * products
        return Cost(kept, meter.peak, flops, max(0.0, again / products), meter.attentions > attentions)


def compiled(shape: ModelShape, mode: ActivationCheckpoint, tokens: int) -> Cost:
    """The block as torch.compile partitions it into a forward and a backward graph, neither of which is run."""
    torch._dynamo.reset()
    graphs: dict[str, torch.fx.GraphModule] = {}

    def compile_nothing(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            graphs[name] = graph

            def run(_: list[Any]) -> list[Any]:  # memory that is never touched is never allocated
                (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
                return [torch.empty_like(o.meta["val"], device="cpu") if o is not None else None for o in outputs]

            run._boxed_call = True  # type: ignore[attr-defined]  # as the compiler's own functions do
            return run

        return compiler

    backend = aot_autograd(
        fw_compiler=compile_nothing("forward"),
        bw_compiler=compile_nothing("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    block = _block(shape, mode, Compile(enable=True)).to_empty(device="cpu")
    block.compile(backend=backend, fullgraph=True, dynamic=False)
    x = torch.empty(1, tokens, shape.dim, dtype=torch.bfloat16, requires_grad=True)
    y, _ = block(x, None, _tables(shape, tokens))
    y.backward(torch.empty_like(y))
    made = {node.name: _source(node) for node in graphs["forward"].graph.nodes}
    kept = sum(
        value.numel() * value.element_size()
        for node in graphs["backward"].graph.nodes
        if node.op == "placeholder" and not node.name.startswith("tangents")
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point()  # no random state
        if not _is_parameter(made[node.name])
    )
    products, _, attention_flops = _graph_work(graphs["forward"])
    again, attentions_again, _ = _graph_work(graphs["backward"])
    return Cost(kept, None, products + attention_flops, max(0.0, again / products - 2), attentions_again > 0)


_VIEWS = {_aten.t.default, _aten.permute.default, _aten.transpose.int, _aten.view.default, _aten.detach.default}


def _source(node: torch.fx.Node) -> torch.fx.Node:
    """The node that this one is a view of."""
    while node.target in _VIEWS and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    return node


def _is_parameter(node: torch.fx.Node) -> bool:
    """Whether a node of the forward graph is a weight or a rotary table; x, the only other input, has 3 dimensions."""
    return node.op == "placeholder" and node.meta["val"].dim() < 3


def _graph_work(graph: torch.fx.GraphModule) -> tuple[int, int, int]:
    """(matrix product FLOPs, forward passes of attention, their FLOPs) of a graph."""
    with Meter() as meter:
        for node in graph.graph.nodes:
            # Attention may be wrapped in an operator that keeps the random state, as an argument of it.
            target = next((a for a in node.args if isinstance(a, torch._ops.OpOverload)), node.target)
            shapes = [a.meta["val"] for a in node.args if isinstance(a, torch.fx.Node) and "val" in a.meta]
            if target in activation_checkpoint._PRODUCTS:
                left, right = shapes[-2:]
                meter.products += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            elif target in activation_checkpoint._ATTENTION:
                batch, heads, seq_len, head_dim = next(
                    s for s in shapes if isinstance(s, Tensor) and s.dim() == 4
                ).shape
                meter.attentions += 1
                meter.attention_flops += 4 * batch * heads * seq_len * seq_len * head_dim // 2
    return meter.products, meter.attentions, meter.attention_flops


def line(flavor: str, mode: str, how: str, cost: Cost) -> str:
    peak = f", at most {cost.peak / 1e6:.0f} MB in the backward pass" if cost.peak else ""
    attention = ", attention too" if cost.recomputed_attention else ""
    return (
        f"{flavor:10} {mode:17} {how:8} keeps {cost.kept / 1e6:5.0f} MB, recomputes {cost.recomputed_products:5.1%} of "
        f"the matrix products{attention}{peak}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"tokens": arguments.tokens, "torch": torch.__version__, "commit": commit(), "blocks": {}}
    for flavor in ("llama3_8b", "llama3_70b"):
        costs = {}
        for name, mode in MODES.items():
            for how, measure in (("eager", eager), ("compiled", compiled)):
                if how == "eager" and mode.mode == "memory_budget":
                    continue
                cost = measure(FLAVORS[flavor], mode, arguments.tokens)
                costs[f"{name}, {how}"] = asdict(cost)
                print(line(flavor, name, how, cost))  # noqa: T201
        record["blocks"][flavor] = costs
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
