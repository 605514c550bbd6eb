"""Kernels and bytes of a compiled Llama block, from the code that Inductor generates for an H100. Needs no GPU.

    python -m benchmarks.inductor_bytes [--output benchmarks/results/inductor_bytes.json]

Code is generated, not measured: bytes are what a kernel must move, and do not say how fast it is. Counted are generated
kernels (Inductor's own estimate), opaque operators (each operand once) and the residual adds that Inductor folds into
`addmm`, for which ATen copies the residual into the output before the product reads it: three passes. Matrix products
and attention are not counted.

Inductor's estimate counts each masked read of a `cat` over the whole output: it gives 428 MB for the reference RoPE's
forward in Llama 3 8B, which reads two halves twice, where 172 MB are distinct. So compare operators other than RoPE
between variants with the same RoPE ("rope, carried" and "all, carried").
"""

import argparse
import copy
import functools
import json
import operator
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import titan_kernels
import torch
import torch._functorch.config as functorch_config
from titan_kernels import validation
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from benchmarks import pretend_gpu
from benchmarks.provenance import commit
from titan_fast import float8
from titan_fast.flavors import FLAVORS, ModelShape
from titan_fast.model import Block
from titan_fast.ops import REFERENCE, Ops

TOKENS = 8192
MODELS = ("llama3_8b", "llama3_70b")
RECORD = Path(__file__).parent / "results" / "inductor_bytes.json"
EXTERNAL = re.compile(r"extern_kernels\.(\w+)\(")
GENERATED = re.compile(r"(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", re.DOTALL)


@dataclass(frozen=True)
class PassBytes:
    """One direction of one block."""

    kernels: int
    """Launches of generated kernels and opaque operators."""
    matmuls: int
    folded_adds: int
    """Residual adds that became the C operand of an `addmm`."""
    megabytes: float
    parts: tuple[tuple[str, float], ...]
    """(kernel, megabytes), the largest first."""


@dataclass(frozen=True)
class BlockBytes:
    """Forward and backward of one compiled block, and what it keeps between them, including its input."""

    model: str
    variant: str
    forward: PassBytes
    backward: PassBytes
    saved_megabytes: float

    @property
    def megabytes(self) -> float:
        return self.forward.megabytes + self.backward.megabytes


@torch.library.custom_op("titan_bench::attention", mutates_args=())
def opaque_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In place of the attention kernel: takes strided heads and returns q's layout, as flash attention does."""
    return torch.empty_like(q)


@torch.library.custom_op("titan_bench::attention_backward", mutates_args=())
def opaque_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


opaque_attention.register_fake(lambda q, k, v: _heads_like(q))
opaque_attention_backward.register_fake(
    lambda gradient, q, k, v, output: (_heads_like(q), _heads_like(k), _heads_like(v))
)
opaque_attention.register_autograd(
    lambda ctx, gradient: opaque_attention_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


def _heads_like(x: Tensor) -> Tensor:
    """[B, heads, S, E] in [B, S, heads, E] memory."""
    batch, heads, seq_len, head_dim = x.shape
    return x.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)


@dataclass(frozen=True)
class Variant:
    """How a block is built and compiled."""

    ops: Ops
    budget: float = 1.0
    """The partitioner's activation memory budget."""


def variants() -> dict[str, Variant]:
    """What is compared. `emit` has norm_linear and swiglu_linear, which save no normalised or gated activation."""
    plain = replace(REFERENCE, attention=lambda q, k, v, bounds: opaque_attention(q, k, v))
    norms = {"rms_norm": titan_kernels.rms_norm, "add_rms_norm": titan_kernels.add_rms_norm}
    ours = replace(plain, **norms, rope=titan_kernels.rope, swiglu=titan_kernels.swiglu)
    emit = replace(ours, norm_linear=titan_kernels.norm_linear, swiglu_linear=titan_kernels.swiglu_linear)
    return {
        "reference": Variant(plain),
        "reference, carried": Variant(replace(plain, carry_residual=True)),
        "norms": Variant(replace(plain, **norms)),
        "norms, carried": Variant(replace(plain, **norms, carry_residual=True)),
        "rope": Variant(replace(plain, rope=titan_kernels.rope)),
        "rope, carried": Variant(replace(plain, rope=titan_kernels.rope, carry_residual=True)),
        "swiglu": Variant(replace(plain, swiglu=titan_kernels.swiglu)),
        "all": Variant(ours),
        "all, carried": Variant(replace(ours, carry_residual=True)),
        "reference, budget 0.7": Variant(plain, budget=0.7),
        "reference, carried, budget 0.7": Variant(replace(plain, carry_residual=True), budget=0.7),
        "rope, carried, budget 0.7": Variant(replace(plain, rope=titan_kernels.rope, carry_residual=True), budget=0.7),
        "emit": Variant(emit),
        "emit, carried": Variant(replace(emit, carry_residual=True)),
        "float8": Variant(replace(plain, linear=float8.linear_with("tensorwise"))),
        "float8, rowwise": Variant(replace(plain, linear=float8.linear_with("rowwise"))),
    }


def measure_block(model: str, variant: str) -> BlockBytes:
    """The bytes of one block of `FLAVORS[model]` over TOKENS tokens of bfloat16, batch 1."""
    chosen = variants()[variant]
    with functorch_config.patch(activation_memory_budget=chosen.budget):
        forward, backward, n_parameters = _trace(FLAVORS[model], chosen.ops)
    saved = _saved_bytes(forward, backward, n_parameters)
    return BlockBytes(model, variant, _pass_bytes(forward, False), _pass_bytes(backward, True), round(saved / 1e6, 1))


def _trace(shape: ModelShape, ops: Ops) -> tuple[GraphModule, GraphModule, int]:
    """A block's forward and backward ATen graphs, and how many of the forward's first inputs are parameters and rotary
    tables; the others are activations."""
    graphs: dict[str, GraphModule] = {}

    def keep(name: str, graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs[name] = graph
        return make_boxed_func(graph)

    with torch.device("meta"):
        block = Block(shape, ops)
    names = [name for name, _ in block.named_parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = [torch.empty(p.shape, dtype=torch.bfloat16, requires_grad=True) for p in block.parameters()]
        tables = [torch.empty(TOKENS, shape.head_dim // 2) for _ in range(2)]

        def run(*inputs: Tensor) -> Any:
            parameters = dict(zip(names, inputs, strict=False))
            cos, sin, x, *residual = inputs[len(names) :]
            arguments = (x, residual[0] if residual else None, (cos, sin))
            return torch.func.functional_call(block, parameters, arguments)

        compiled = aot_function(
            run,
            fw_compiler=functools.partial(keep, "forward"),  # pyright: ignore[reportArgumentType]
            bw_compiler=functools.partial(keep, "backward"),  # pyright: ignore[reportArgumentType]
            partition_fn=_partition,
            decompositions=select_decomp_table(),
        )
        streams = 2 if ops.carry_residual else 1
        activations = [
            torch.empty(1, TOKENS, shape.dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(streams)
        ]
        outputs = [out for out in compiled(*weights, *tables, *activations) if out is not None]
        torch.autograd.grad(outputs, [*weights, *activations], [torch.empty_like(out) for out in outputs])
    return graphs["forward"], graphs["backward"], len(names) + len(tables)


def _partition(graph: GraphModule, inputs: Any, **arguments: Any) -> tuple[GraphModule, GraphModule]:
    """Like Inductor: its passes over the joint graph, then the minimum cut."""
    joint_graph_passes(graph)
    return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **arguments)


def _pass_bytes(graph: GraphModule, is_backward: bool) -> PassBytes:
    source = pretend_gpu.generate(copy.deepcopy(graph), FakeTensorMode(allow_non_fake_inputs=True), is_backward)
    called = re.sub(r"'''.*?'''", "", source, flags=re.DOTALL).split("def benchmark_compiled_module")[0]
    parts: list[tuple[str, float]] = []
    for name, body in GENERATED.findall(source):
        gigabytes = re.search(r"'kernel_num_gb': ([\d.e+-]+)", body)
        launches = len(re.findall(rf"\b{name}\.run\(", called))
        parts += [(name, float(gigabytes[1]) * 1e9 if gigabytes else 0.0)] * launches
    parts += [(str(node.target), _operand_bytes(node)) for node in graph.graph.nodes if _is_ours(node)]
    kernels = len(parts)
    external = EXTERNAL.findall(called)
    adds = [_nbytes(node) for node in graph.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    folded = external.count("addmm")
    parts += [("addmm's copy and read of its C operand", 3 * max(adds, default=0))] * folded
    parts = [(name, round(moved / 1e6, 1)) for name, moved in sorted(parts, key=lambda part: -part[1])]
    return PassBytes(kernels, len(external), folded, round(sum(part[1] for part in parts), 1), tuple(parts))


def _is_ours(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "titan_kernels"


def _nbytes(node: Node) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _operand_bytes(node: Node) -> int:
    return _nbytes(node) + sum(_nbytes(source) for source in node.all_input_nodes)


def _saved_bytes(forward: GraphModule, backward: GraphModule, n_parameters: int) -> int:
    """Memory that stays alive from forward to backward: the storages behind the backward graph's inputs, once each,
    without parameters, rotary tables and incoming gradients. A saved view keeps all of its storage."""
    nodes = {node.name: node for node in forward.graph.nodes}
    parameters = set([node for node in forward.graph.nodes if node.op == "placeholder"][:n_parameters])
    saved = set()
    for placeholder in backward.graph.nodes:
        if placeholder.op == "placeholder" and placeholder.name in nodes:
            saved.add(_storage(nodes[placeholder.name]))
    return sum(_nbytes(node) for node in saved - parameters)


def _storage(node: Node) -> Node:
    """The node whose memory `node` is a view of."""
    while node.op == "call_function" and node.all_input_nodes:
        source = node.all_input_nodes[0]
        is_part = node.target is operator.getitem and _is_view(source)
        if not (_is_view(node) or is_part):
            break
        node = source
    return node


def _is_view(node: Node) -> bool:
    unsafe = torch.ops.aten._unsafe_view.default  # a view that is not marked as one
    return isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target is unsafe)


def recorded(path: Path = RECORD) -> dict[str, Any]:
    return json.loads(path.read_text())


def summary(blocks: Sequence[BlockBytes]) -> str:
    """A line per block: what is moved and what is kept."""
    line = "{:12} {:32} {:>8} {:>5} {:>8} {:>9} {:>8} {:>7}".format
    lines = [line("model", "variant", "kernels", "addmm", "forward", "backward", "sum", "saved")]
    for block in blocks:
        ahead, back = block.forward, block.backward
        kernels = f"{ahead.kernels} + {back.kernels}"
        folded = ahead.folded_adds + back.folded_adds
        megabytes = (ahead.megabytes, back.megabytes, block.megabytes, block.saved_megabytes)
        lines.append(line(block.model, block.variant, kernels, folded, *map(round, megabytes)))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inductor_bytes", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(variants()), choices=list(variants()))
    parser.add_argument("--output", type=Path, help="write JSON here")
    options = parser.parse_args(arguments)
    pretend_gpu.install()
    # The graphs are traced with fake CPU tensors, which the operators refuse unless they are interpreted.
    pretend_gpu.override(validation, "is_interpreted", lambda kernel: True)
    blocks = [measure_block(model, variant) for model in options.models for variant in options.variants]
    text = f"Inductor's code for sm_90, torch {torch.__version__}, {TOKENS} tokens; MB; generated, not measured"
    sys.stdout.write(f"{text}\n{summary(blocks)}\n")
    if options.output:
        content = {
            "what": text,
            "torch": torch.__version__,
            "commit": commit(),
            "blocks": [asdict(block) for block in blocks],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
