"""Every layout of processes trains the same model: loss, gradient norm and weights are those of one process."""

import dataclasses
import math
import os
import warnings
import weakref
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from needs import has_triton
from shapes import LLAMA3
from small_runs import Trace, build, config_of, own_batches, train
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import Task, World, results, run_world

from titan_fast import parallel, step
from titan_fast.config import mesh_degrees
from titan_fast.counted_step import fake_world
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape
from titan_fast.model import Block, Llama
from titan_fast.optim import clip_grad_norm_

# No degree divides the 131 rows of embedding and head; TIED's head is its embedding.
ODD = dataclasses.replace(LLAMA3, vocab_size=131)
TIED = dataclasses.replace(ODD, tied=True)
SHAPES = {"llama3": LLAMA3, "odd vocabulary": ODD, "tied": TIED, "documents": LLAMA3}
# One of them is trained with z-loss and one within documents, in every layout and in the single process that it is
# compared with.
OPTIONS = {"odd vocabulary": {"loss.z_loss": 1e-2}, "documents": {"training.document_mask": True}}


def mesh(replicate: int, shard: int, tensor: int) -> dict[str, Any]:
    return {
        "parallelism.data_parallel_replicate_degree": replicate,
        "parallelism.data_parallel_shard_degree": shard,
        "parallelism.tensor_parallel_degree": tensor,
    }


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way of training that must agree with one process, within `bound` relative at every step."""

    name: str
    world: int
    bound: float
    options: dict[str, Any]
    shape: str = "llama3"
    passes: int = 1
    steps: int = 8

    @property
    def reference(self) -> str:
        """The single-process run to compare with."""
        return f"{self.shape}, {self.steps} steps"

    @property
    def task(self) -> Task:
        options = self.options | OPTIONS.get(self.shape, {})
        return Task(self.name, train, (SHAPES[self.shape], options, self.passes, self.steps))


TRITON = {f"kernels.{operator}": "triton" for operator in ("rms_norm", "rope", "swiglu", "cross_entropy")}
REEMIT = {"kernels.reemit": "triton"}
CARRY = {"kernels.carry_residual": True}
INDUCTOR = {"compile.enable": True}
# All of torch.compile except generating code, which is the same for every layout and slow.
TRACED = {"compile.enable": True, "compile.backend": "aot_eager"}
POINTWISE = {"activation_checkpoint.mode": "pointwise"}
RESHARD = "parallelism.fsdp_reshard_after_forward"
DIRECT = {"parallelism.fsdp_buffers": "direct"}

# For CPU tensors kernels need the interpreter, which is not enabled in a process that may use a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and has_triton()

LAYOUTS = [
    Layout("2 passes", 1, 1e-6, mesh(1, 1, 1), passes=2),
    Layout("4 passes", 1, 1e-6, mesh(1, 1, 1), passes=4),
    Layout("compiled", 1, 1e-5, mesh(1, 1, 1) | INDUCTOR),
    Layout("compiled, documents", 1, 1e-5, mesh(1, 1, 1) | INDUCTOR, "documents", steps=5),
    Layout("re-emitting, documents", 1, 1e-5, mesh(1, 1, 1) | REEMIT, "documents", steps=1),
    Layout("triton", 1, 1e-5, mesh(1, 1, 1) | TRITON, steps=1),  # the interpreter takes seconds a step
    Layout("re-emitting", 1, 1e-5, mesh(1, 1, 1) | REEMIT, steps=1),
    Layout("re-emitting, carried residual", 1, 1e-5, mesh(1, 1, 1) | REEMIT | CARRY, steps=1),
    Layout("FSDP 2", 2, 1e-6, mesh(1, 2, 1)),
    Layout("FSDP 2, traced, re-emitting, pointwise", 2, 1e-5, mesh(1, 2, 1) | TRACED | REEMIT | POINTWISE, steps=1),
    Layout("FSDP 2, tied", 2, 1e-6, mesh(1, 2, 1), "tied"),
    Layout("FSDP 2, 4 passes", 2, 1e-6, mesh(1, 2, 1), passes=4),
    Layout("FSDP 2, always reshard", 2, 1e-6, mesh(1, 2, 1) | {RESHARD: "always"}),
    Layout("FSDP 2, never reshard", 2, 1e-6, mesh(1, 2, 1) | {RESHARD: "never"}),
    Layout("FSDP 2, offload", 2, 1e-6, mesh(1, 2, 1) | {"training.enable_cpu_offload": True}),
    Layout("FSDP 2, direct", 2, 1e-6, mesh(1, 2, 1) | DIRECT, passes=2),
    Layout("FSDP 2, direct, offload", 2, 1e-6, mesh(1, 2, 1) | DIRECT | {"training.enable_cpu_offload": True}),
    Layout("FSDP 2, direct, never reshard", 2, 1e-6, mesh(1, 2, 1) | DIRECT | {RESHARD: "never"}, "tied", steps=5),
    Layout("FSDP 1, direct, offload", 1, 1e-6, mesh(1, 1, 1) | DIRECT | {"training.enable_cpu_offload": True}, steps=5),
    Layout("HSDP 2 x 1, direct", 2, 1e-6, mesh(2, 1, 1) | DIRECT, steps=5),
    Layout("FSDP 2, traced, documents, 2 passes", 2, 1e-5, mesh(1, 2, 1) | TRACED, "documents", passes=2, steps=5),
    Layout("TP 2, documents", 2, 1e-5, mesh(1, 1, 2), "documents", steps=5),
    Layout("TP 2, traced, pointwise, documents", 2, 1e-5, mesh(1, 1, 2) | TRACED | POINTWISE, "documents", steps=5),
    Layout("TP 2", 2, 1e-5, mesh(1, 1, 2)),
    Layout("TP 2, offload", 2, 1e-5, mesh(1, 1, 2) | {"training.enable_cpu_offload": True}, "tied", steps=5),
    Layout("TP 2, odd vocabulary", 2, 1e-5, mesh(1, 1, 2), "odd vocabulary"),
    Layout("TP 2, carried residual", 2, 1e-5, mesh(1, 1, 2) | {"kernels.carry_residual": True}),
    Layout("TP 2, traced, pointwise", 2, 1e-5, mesh(1, 1, 2) | TRACED | {"activation_checkpoint.mode": "pointwise"}),
    Layout("TP 2, traced, full", 2, 1e-5, mesh(1, 1, 2) | TRACED | {"activation_checkpoint.mode": "full"}),
    Layout(
        "TP 2, traced, memory budget", 2, 1e-5, mesh(1, 1, 2) | TRACED | {"activation_checkpoint.mode": "memory_budget"}
    ),
    Layout("TP 2, selective op", 2, 1e-5, mesh(1, 1, 2) | {"activation_checkpoint.mode": "selective"}),
    Layout("TP 2, triton", 2, 1e-5, mesh(1, 1, 2) | TRITON, steps=1),
    Layout("FSDP 4", 4, 1e-6, mesh(1, 4, 1), steps=20),
    Layout("FSDP 4, odd vocabulary", 4, 1e-6, mesh(1, 4, 1), "odd vocabulary"),
    Layout("FSDP 4, odd vocabulary, direct", 4, 1e-6, mesh(1, 4, 1) | DIRECT, "odd vocabulary", steps=5),
    Layout("FSDP 2 x TP 2", 4, 1e-5, mesh(1, 2, 2), steps=20),
    Layout("FSDP 2 x TP 2, direct", 4, 1e-5, mesh(1, 2, 2) | DIRECT, steps=5),
    Layout("FSDP 2 x TP 2, offload", 4, 1e-5, mesh(1, 2, 2) | {"training.enable_cpu_offload": True}, steps=5),
    Layout("FSDP 2 x TP 2, tied", 4, 1e-5, mesh(1, 2, 2), "tied"),
    Layout("HSDP 2 x 2", 4, 1e-5, mesh(2, 2, 1)),
    Layout("HSDP 2 x 2, direct, 2 passes", 4, 1e-5, mesh(2, 2, 1) | DIRECT, passes=2, steps=5),
    Layout("HSDP 2 x 2, 2 passes", 4, 1e-5, mesh(2, 2, 1), passes=2),
    Layout("HSDP 2 x 1 x TP 2", 4, 1e-5, mesh(2, 1, 2)),
]
if not INTERPRETED:
    LAYOUTS = [layout for layout in LAYOUTS if "triton" not in layout.options.values()]
REFERENCES = {
    layout.reference: Layout(layout.reference, 1, 0.0, mesh(1, 1, 1), layout.shape, steps=layout.steps)
    for layout in LAYOUTS
}


# Probes: what a layout does internally, and what happens if something is broken on purpose.


def one_gradient(world: World, model: Llama, options: dict[str, Any]) -> Tensor:
    """The gradient's norm after one forward and backward pass; gradients stay in the parameters."""
    config = config_of(options, world.size)
    degrees = mesh_degrees(config.parallelism, world.size)
    batches = own_batches(config, world, 0, model.shape.vocab_size)
    loss = step.forward_backward(model, batches, step.one_over_valid_tokens(batches, degrees))
    return clip_grad_norm_(model.parameters(), 0.0, loss)


def local(tensor: Tensor | None) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else torch.as_tensor(tensor)


def broken_norm(world: World, options: dict[str, Any], breakage: str) -> float:
    """The gradient norm of the first step with something broken."""
    model = build(config_of(options, world.size), LLAMA3, world)
    if breakage == "divide factor":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(2.0)
    whole, step.finish_gradients = step.finish_gradients, step.finish_gradients
    if breakage == "norm gradients":
        step.finish_gradients = lambda model: None
    try:
        return one_gradient(world, model, options).item()
    finally:
        step.finish_gradients = whole


class Collectives(TorchDispatchMode):
    """Records collectives with the dtype of what is sent, and whatever else is recorded by hand, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d."):
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.log.append((name.split(".")[1].strip("_"), tensors[-1].dtype))
        return function(*args, **(kwargs or {}))


def gathers_and_blocks(world: World, buffers: str, reshard: str, validates: bool = False) -> list[Any]:
    """One step's all-gathers and the starts of blocks, forward and backward, in the order they happen. validates: the
    step comes after a validation."""
    options = mesh(1, 2, 1) | {RESHARD: reshard, "parallelism.fsdp_buffers": buffers}
    model = build(config_of(options, world.size), dataclasses.replace(LLAMA3, n_layers=4), world)
    one_gradient(world, model, options)  # FSDP sets itself up in the first step
    if validates:
        batches = own_batches(config_of(options, world.size), world, 0, model.shape.vocab_size)
        step.validation_loss(
            model, iter([batches]), 1, mesh_degrees(config_of(options, world.size).parallelism, world.size)
        )
    with Collectives() as seen:
        for i, block in enumerate(cast(list[Block], list(model.blocks))):
            block.attention.register_forward_pre_hook(lambda *_, i=i: seen.log.append(f"forward {i}"))
            block.feed_forward.register_full_backward_hook(lambda *_, i=i: seen.log.append(f"backward {i}"))
        one_gradient(world, model, options)
    return [x if isinstance(x, str) else "gather" for x in seen.log if isinstance(x, str) or "allgather" in x[0]]


def reduced_dtypes(world: World, reduce: str) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    """(dtypes sent by gradient reduction, dtypes of gathered parameters, dtypes of the gradients left)."""
    options = mesh(1, 2, 1) | {
        "training.mixed_precision_param": "bfloat16", "training.mixed_precision_reduce": reduce
    }  # fmt: skip
    model = build(config_of(options, world.size), LLAMA3, world)
    with Collectives() as seen:
        one_gradient(world, model, options)
    sent = {name: {dtype for n, dtype in seen.log if n.startswith(name)} for name in ("reduce_scatter", "allgather")}
    return sent["reduce_scatter"], sent["allgather"], {p.grad.dtype for p in model.parameters() if p.grad is not None}


def bfloat16_norm_gradients(world: World) -> tuple[bool, bool]:
    """With tensor parallelism in bfloat16: (each norm's gradient is exactly the float32 sum of the ranks' own, some of
    these sums need more than bfloat16)."""
    options = mesh(1, 1, 2) | {"training.mixed_precision_param": "bfloat16"}
    model = build(config_of(options, world.size), LLAMA3, world)
    own: list[Tensor] = []

    def finish(model: Llama) -> None:
        own.extend(local(n.weight.grad).clone() for n in model.modules() if isinstance(n, parallel.Norm))
        parallel.finish_gradients(model)

    step.finish_gradients = finish
    try:
        one_gradient(world, model, options)
    finally:
        step.finish_gradients = parallel.finish_gradients
    found = [local(n.weight.grad) for n in model.modules() if isinstance(n, parallel.Norm)]
    exact, wide = True, False
    for mine, total in zip(own, found, strict=True):
        parts = [torch.empty_like(mine) for _ in range(world.size)]
        dist.all_gather(parts, mine)
        exact &= total.dtype == torch.float32 and torch.equal(total, sum(parts, torch.zeros_like(mine)))
        wide |= not torch.equal(total, total.bfloat16().float())
    return exact, wide


def warnings_of_a_step(world: World) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        options = mesh(1, 2, 2)
        one_gradient(world, build(config_of(options, world.size), LLAMA3, world), options)
    return [str(w.message) for w in seen]


class LiveBytes(TorchDispatchMode):
    """Records the most memory that new tensors hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                # A DTensor reports the whole tensor's memory but has only its own part.
                storage = local(tensor).untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.peak = max(self.peak, sum(self.live.values()))
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        return result


def peak_of_building(world: World, options: dict[str, Any]) -> tuple[int, int, int]:
    """(most bytes held while the model is built, bytes of the whole model, bytes of its largest parameter)."""
    shape = dataclasses.replace(LLAMA3, n_layers=12)
    with LiveBytes() as memory:
        model = build(config_of(options, world.size), shape, world)
    sizes = [4 * math.prod(p.shape) for p in model.parameters()]
    return memory.peak, sum(sizes), max(sizes)


PROBES: dict[int, list[Task]] = {
    1: [Task("building, 1", peak_of_building, (mesh(1, 1, 1),))],
    2: [
        Task("whole", broken_norm, (mesh(1, 2, 1), "nothing")),
        Task("wrong divide factor", broken_norm, (mesh(1, 2, 1), "divide factor")),
        Task("missing all-reduce", broken_norm, (mesh(1, 1, 2), "norm gradients")),
        Task("order, flat", gathers_and_blocks, ("flat", "always")),
        Task("order, direct", gathers_and_blocks, ("direct", "always")),
        Task("order, after validation", gathers_and_blocks, ("direct", "always", True)),
        Task("order, default", gathers_and_blocks, ("flat", "default")),
        Task("order, never", gathers_and_blocks, ("flat", "never")),
        Task("float32 reduction", reduced_dtypes, ("float32",)),
        Task("bfloat16 reduction", reduced_dtypes, ("bfloat16",)),
        Task("norms in bfloat16", bfloat16_norm_gradients),
    ],
    4: [
        Task("building", peak_of_building, (mesh(1, 4, 1),)),
        Task("warnings", warnings_of_a_step),
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Everything that needs processes, in one world of each size."""
    found: dict[str, list[Any]] = {}
    for size in (1, 2, 4):
        tasks = [layout.task for layout in [*REFERENCES.values(), *LAYOUTS] if layout.world == size] + PROBES[size]
        found |= run_world(size, tasks, tmp_path_factory.mktemp(f"world{size}"))
    return found


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_agrees_with_one_process(runs: dict[str, list[Any]], layout: Layout) -> None:
    expected: Trace = results(runs, layout.reference)[0]
    found: list[Trace] = results(runs, layout.name)
    assert all(other.norms == found[0].norms and other.losses == found[0].losses for other in found)
    assert worst(found[0].losses, expected.losses) <= layout.bound
    assert worst(found[0].norms, expected.norms) <= layout.bound
    assert found[0].first.keys() == expected.first.keys()
    for name, value in expected.first.items():
        assert torch.equal(found[0].first[name], value), f"{name} starts elsewhere"
    assert len(found[0].losses) == layout.steps
    for name, value in expected.clipped.items():
        # Up to 20 steps later. Bounds are for sums over a tensor; single elements near zero may differ by more.
        assert (found[0].clipped[name] - value).norm() <= 20 * layout.bound * value.norm(), name
        assert (found[0].last[name] - expected.last[name]).norm() <= 20 * layout.bound * expected.last[name].norm(), (
            name
        )


def test_a_broken_layout_is_seen(runs: dict[str, list[Any]]) -> None:
    """The above comparison notices a gradient divided by too much, and norms whose gradients are not summed."""
    expected: float = results(runs, "llama3, 20 steps")[0].norms[0]
    assert results(runs, "whole")[0] == pytest.approx(expected, rel=1e-6)
    assert results(runs, "wrong divide factor")[0] == pytest.approx(expected / 2, rel=1e-5)
    assert abs(results(runs, "missing all-reduce")[0] / expected - 1) > 1e-4


@pytest.mark.parametrize("case", ["flat", "direct", "after validation"])
def test_units_are_gathered_one_ahead(runs: dict[str, list[Any]], case: str) -> None:
    log = results(runs, f"order, {case}")[0]
    gathers = {entry: log[: i + 1].count("gather") for i, entry in enumerate(log) if entry != "gather"}
    # Forward: the embedding's, this block's and the next unit's parameters are under way when block i begins to attend.
    assert [gathers[f"forward {i}"] for i in range(4)] == [3, 4, 5, 6], log
    # Backward, from the head down: block i's own and block i - 1's have been asked for when block i begins; nothing is
    # left to ask for with the first, for the embedding's gradient needs no weight.
    assert [gathers[f"backward {i}"] for i in (3, 2, 1, 0)] == [9, 10, 11, 11], log
    assert log.count("gather") == 11


def test_what_the_backward_pass_needs_first_is_kept(runs: dict[str, list[Any]]) -> None:
    """The last of four blocks, and the head's unit. By default the other three are gathered again."""
    for reshard, again in (("default", 3), ("never", 0)):
        log = results(runs, f"order, {reshard}")[0]
        backward = log[log.index("forward 3") :]
        assert backward.count("gather") == again and log.count("gather") == 6 + again, log


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_bfloat16_parameters_are_reduced_as_asked(runs: dict[str, list[Any]], reduce: str) -> None:
    reduced, gathered, gradients = results(runs, f"{reduce} reduction")[0]
    assert reduced == {getattr(torch, reduce)}
    assert gathered == {torch.bfloat16}
    assert gradients == {torch.float32}


def test_norm_gradients_are_summed_in_float32(runs: dict[str, list[Any]]) -> None:
    for exact, wide in results(runs, "norms in bfloat16"):
        assert exact and wide


def test_no_rank_holds_the_whole_model(runs: dict[str, list[Any]]) -> None:
    for peak, whole, largest in results(runs, "building"):
        # Its shard, and one whole parameter at a time, in the few copies that drawing random values takes.
        assert peak <= whole / 4 + 5 * largest + 2**12 < whole / 2
    peak, whole, _ = results(runs, "building, 1")[0]
    assert peak >= whole  # the measurement notices a model that is held whole


def test_fsdp_does_not_litter_the_log(runs: dict[str, list[Any]]) -> None:
    for messages in results(runs, "warnings"):
        assert not [m for m in messages if "FSDP" in m], messages


# Bad input.


def refusal(options: dict[str, Any], world_size: int, shape: ModelShape = LLAMA3) -> str:
    with pytest.raises(ConfigError) as caught:
        config = config_of(options, world_size)
        degrees = mesh_degrees(config.parallelism, world_size)
        parallel.check(config, shape, degrees, torch.device("cpu"))
    return str(caught.value)


def test_a_world_that_the_mesh_cannot_fill() -> None:
    sentence = refusal(mesh(2, 3, 2), 8)
    assert "2 x" in sentence and "3 x" in sentence and "= 12" in sentence and "world size is 8" in sentence
    assert "world size is 3" in refusal(mesh(1, -1, 2), 3)


@pytest.mark.parametrize(
    ("changes", "tensor", "numbers"),
    [
        ({}, 3, "n_heads 8 is not divisible by tensor_parallel_degree 3"),
        ({}, 4, "n_kv_heads 2 is not divisible by tensor_parallel_degree 4"),
        ({"ffn_dim": 97}, 2, "ffn_dim 97 is not divisible by tensor_parallel_degree 2"),
    ],
)
def test_a_degree_that_does_not_divide(changes: dict[str, int], tensor: int, numbers: str) -> None:
    assert numbers in refusal(mesh(1, 1, tensor), tensor, dataclasses.replace(LLAMA3, **changes))


def test_a_sequence_that_does_not_divide() -> None:
    sentence = refusal(mesh(1, 1, 2) | {"training.seq_len": 15}, 2)
    assert "training.seq_len 15 is not divisible by tensor_parallel_degree 2" in sentence


def test_asynchronous_tensor_parallelism_where_it_cannot_work() -> None:
    option = {"parallelism.enable_async_tensor_parallel": True}
    compiled = mesh(1, 1, 2) | option | {"compile.enable": True}
    lacks = "a tensor_parallel_degree above 1 and blocks compiled by inductor and CUDA"
    assert lacks in refusal(mesh(1, 1, 1) | option, 1)
    assert "without CUDA" in refusal(compiled, 2)
    for without in ({"compile.components": "optimizer"}, {"compile.backend": "aot_eager"}):
        assert "without blocks compiled by inductor and CUDA" in refusal(compiled | without, 2)


def test_a_vocabulary_of_which_a_rank_gets_nothing() -> None:
    assert "a vocabulary of 9 leaves the last of 4" in refusal(
        mesh(1, 1, 4), 4, dataclasses.replace(LLAMA3, n_heads=8, n_kv_heads=4, vocab_size=9)
    )


def test_a_parameter_of_a_changed_model_that_no_style_takes() -> None:
    with fake_world(2), torch.device("meta"):
        tensor = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        model = Llama(LLAMA3, max_seq_len=16)
        parallel.apply_tensor_parallel(model, tensor, asynchronous=False)
        model = Llama(LLAMA3, max_seq_len=16)
        model.blocks[1].get_submodule("attention").register_parameter("scale", torch.nn.Parameter(torch.ones(4)))
        with pytest.raises(ConfigError, match=r"blocks\.1\.attention\.scale has no tensor parallel style"):
            parallel.apply_tensor_parallel(model, tensor, asynchronous=False)
