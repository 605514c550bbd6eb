"""Switches that must change the speed but not the training: each compared with the plain path over many steps."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch._inductor.config as inductor
import torch.compiler.config
import torch.nn.functional as F
from shapes import LLAMA3
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import conftest as kernel_suite
from benchmarks.train_suite import environment_of_children
from titan_fast import compilation, masters, parallel
from titan_fast.checkpoint import tensors_of
from titan_fast.compilation import compiled_cross_entropy, optimizer_compiler
from titan_fast.config import Comm, Compile, Config, from_options, mesh_degrees
from titan_fast.distributed import World, start
from titan_fast.errors import ConfigError
from titan_fast.loader import Batch
from titan_fast.loss import IGNORE_INDEX, has_torch_loss, torch_linear_cross_entropy
from titan_fast.masters import OnePassAdamW, gradient_of, master_of, masters_as_weights, round_masters, update
from titan_fast.model import Llama
from titan_fast.ops import REFERENCE, build_ops, source_digest
from titan_fast.optim import build_optimizer, clip_gradients, step_unless
from titan_fast.step import build_model, forward_backward, one_over_valid_tokens, workload

CPU = torch.device("cpu")
STEPS, BATCH, SEQ_LEN = 30, 4, 16
BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
FSDP = {"parallelism.single_device": "fsdp", **BFLOAT16}
MASTERS = {"parallelism.single_device": "masters", **BFLOAT16}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start(Comm(), CPU) as alone:
        yield alone


def config_of(options: dict[str, Any], passes: int = 1) -> Config:
    basic = {
        "training.seq_len": SEQ_LEN, "training.local_batch_size": BATCH // passes,
        "training.global_batch_size": BATCH, "optimizer.lr": 1e-2, "training.max_norm": 0.5,
        "metrics.sample_prompt": "", "loss.chunk_size": 24, "compile.backend": "aot_eager",
    }  # fmt: skip
    return from_options(
        {key: value if isinstance(value, list) else [str(value)] for key, value in (basic | options).items()}
    )


def batches_of(step: int, passes: int) -> list[Batch]:
    text = torch.randint(LLAMA3.vocab_size, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step % 4))
    labels = text[:, 1:].clone()
    labels[0, :5] = IGNORE_INDEX
    return [
        Batch(*part)
        for part in zip(text[:, :-1].chunk(passes), labels.chunk(passes), strict=True)
    ]  # fmt: skip


@dataclasses.dataclass
class Trained:
    losses: list[float]
    model: Llama
    optimizer: torch.optim.AdamW

    def weights(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.model, self.optimizer)
        return {
            name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()
            for name, tensor in tensors.items()
        }


def one_step(trained: Trained, config: Config, batches: list[Batch], bad: float = 0.0) -> Tensor:
    degrees = mesh_degrees(config.parallelism, 1)
    loss = forward_backward(trained.model, batches, one_over_valid_tokens(batches, degrees))
    clip_gradients(trained.optimizer, config.training.max_norm, loss)
    step_unless(trained.optimizer, torch.tensor(bad))
    trained.optimizer.zero_grad(set_to_none=True)
    return loss


def train(options: dict[str, Any], passes: int = 1, steps: int = STEPS) -> Trained:
    config = config_of(options, passes)
    degrees = mesh_degrees(config.parallelism, 1)
    parallel.check(config, LLAMA3, degrees, CPU)
    torch._dynamo.reset()
    ops = build_ops(config.kernels, CPU, workload(config, LLAMA3, degrees))
    model = build_model(config, LLAMA3, ops, degrees, CPU)
    trained = Trained([], model, build_optimizer(model, config.optimizer, optimizer_compiler(config.compile)))
    for step in range(steps):
        trained.losses.append(one_step(trained, config, batches_of(step, passes)).item())
    return trained


def assert_same_training(found: Trained, expected: Trained, bound: float) -> None:
    """Losses are within `bound` relative, weights and moments within 30 times that, and the loss has fallen."""
    assert expected.losses[-1] < 0.9 * expected.losses[0]
    assert found.losses == pytest.approx(expected.losses, rel=bound)
    ours = found.weights()
    for name, tensor in expected.weights().items():
        error = (ours[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-9)
        assert error < 30 * bound, name


COMPILED = {"compile.enable": True}


@pytest.mark.parametrize("passes", [1, 2])
def test_masters_train_as_fsdp_does(world: World, passes: int) -> None:
    """Bit for bit: the same float32 sums, moments and weights, and the same rounding to bfloat16."""
    fsdp, masters = train(FSDP, passes), train(MASTERS, passes)
    assert any(isinstance(module, FSDPModule) for module in fsdp.model.modules())
    assert not any(isinstance(module, FSDPModule) for module in masters.model.modules())
    assert {p.dtype for p in masters.model.parameters()} == {torch.bfloat16}
    assert_same_training(masters, fsdp, 1e-6)


@pytest.mark.parametrize("options", [MASTERS, {}], ids=["masters", "float32"])
def test_the_one_pass_update_is_torchs_fused_one(world: World, options: dict[str, Any]) -> None:
    compiled = options | COMPILED | {"compile.components": ["optimizer"]}
    assert isinstance(train(compiled, steps=1).optimizer, OnePassAdamW)
    # A difference in a master's last bit can change a bit of the bfloat16 weight, and from there runs drift apart
    # (by 0.09% on a CPU without AVX).
    assert_same_training(train(compiled, steps=8), train(options, steps=8), 3e-3 if options else 1e-5)


COMPONENTS = {"blocks": "blocks", "norm": "norm", "loss": "loss", "all": "blocks norm loss optimizer", "model": "model"}


@pytest.mark.parametrize("components", COMPONENTS.values(), ids=COMPONENTS)
def test_what_is_compiled_trains_as_eager_does(world: World, components: str) -> None:
    found = train(COMPILED | {"compile.components": components.split()})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same_training(found, train({}), 1e-5)


def test_the_whole_model_compiles_with_masters(world: World) -> None:
    # Runs in bfloat16 drift apart: at this learning rate 0.1% in 16 steps, several in 30.
    found = train(MASTERS | COMPILED | {"compile.components": ["model", "optimizer"]}, steps=12)
    assert_same_training(found, train(MASTERS, steps=12), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["compile.coordinate_descent", "compile.max_autotune"])
def test_inductors_settings_change_no_result(world: World, tmp_path: Path, option: str) -> None:
    tuned = {"compile.backend": "inductor", option: True}
    assert_same_training(train(COMPILED | tuned, steps=10), train({}, steps=10), 1e-5)


@pytest.mark.skipif(not has_torch_loss(), reason="this torch has no linear_cross_entropy")
def test_torchs_linear_cross_entropy_trains_alike(world: World) -> None:
    assert_same_training(train({"loss.implementation": "torch"}), train({}), 1e-5)


@pytest.mark.skipif(not has_torch_loss(), reason="this torch has no linear_cross_entropy")
def test_torchs_linear_cross_entropy_in_bfloat16() -> None:
    """The sum is not rounded to bfloat16, and the logits of all tokens never exist at once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1024, 64, generator=generator).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(2048, 64, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(2048, (2, 1024), generator=generator)
    labels[:, ::7] = IGNORE_INDEX
    scale = 1 / (labels != IGNORE_INDEX).sum().float()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.cross_entropy((wide[0] @ wide[1].T).flatten(0, 1), labels.flatten())
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        loss = torch_linear_cross_entropy(x, weight, labels, scale)
        gradients = torch.autograd.grad(loss, (x, weight))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=3e-4)  # a sum in bfloat16 would be off by up to 4e-3
    assert max(sizes) <= labels.numel() * weight.shape[0] / 4
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, wide), strict=True):
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("bad_at", [0, 2])
@pytest.mark.parametrize("components", ["", "optimizer"])
def test_a_bad_step_changes_no_master(world: World, components: str, bad_at: int) -> None:
    compiles = COMPILED | {"compile.components": components.split()} if components else {}
    config = config_of(MASTERS | compiles)
    trained = train(MASTERS | compiles, steps=bad_at)
    before = trained.weights()
    batches = batches_of(0, 1)
    degrees = mesh_degrees(config.parallelism, 1)
    loss = forward_backward(trained.model, batches, one_over_valid_tokens(batches, degrees))
    next(iter(trained.model.parameters())).grad.fill_(float("nan"))  # type: ignore[union-attr]
    norm = clip_gradients(trained.optimizer, 1.0, loss)
    assert norm.isnan()
    step_unless(trained.optimizer, torch.tensor(1.0))
    trained.optimizer.zero_grad()
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.weights().items())
    one_step(trained, config, batches)
    assert not any(torch.equal(before[name], tensor) for name, tensor in trained.weights().items())


@pytest.mark.parametrize(
    ("options", "devices", "kept"),
    [
        (BFLOAT16, 1, "masters"),
        (BFLOAT16, 2, "fsdp"),
        (BFLOAT16 | {"training.enable_cpu_offload": True}, 1, "fsdp"),
        (BFLOAT16 | {"optimizer.implementation": "foreach"}, 1, "fsdp"),
        (FSDP, 1, "fsdp"),
        ({}, 1, "fsdp"),
    ],
)
def test_what_a_device_keeps_of_weights(options: dict[str, Any], devices: int, kept: str) -> None:
    config = config_of(options)
    assert parallel.weights_kept(config, devices, parallel.precision(config.training, CPU)) == kept


def test_masters_and_weights_change_places(world: World) -> None:
    model = train(MASTERS, steps=1).model
    rounded = {name: p.detach().clone() for name, p in model.named_parameters()}
    with masters_as_weights(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        for parameter in model.parameters():
            parameter.data.mul_(2.0)
    assert all(torch.equal(p, 2 * rounded[name]) for name, p in model.named_parameters())
    for parameter in model.parameters():
        master_of(parameter).mul_(0.5)
    round_masters(model)
    assert all(torch.equal(p, rounded[name]) for name, p in model.named_parameters())


def test_bfloat16_alone_keeps_nothing_wider(world: World) -> None:
    trained = train({"parallelism.single_device": "bfloat16", **BFLOAT16}, steps=2)
    moments = [state["exp_avg"] for state in trained.optimizer.state.values()]
    assert {tensor.dtype for tensor in (*trained.model.parameters(), *moments)} == {torch.bfloat16}
    assert not any(hasattr(p, "master") for p in trained.model.parameters())


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compilable_cross_entropy_is_the_references(z_loss: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels, scale = (3 * torch.randn(40, 50)).to(dtype), torch.randint(50, (40,)), torch.tensor(0.3)
    labels[::7] = IGNORE_INDEX
    ops = compiled_cross_entropy(REFERENCE, lambda function: function)
    assert ops.cross_entropy_with_grad_ is not REFERENCE.cross_entropy_with_grad_
    expected, found = logits.clone(), logits.clone()
    losses = REFERENCE.cross_entropy_with_grad_(expected, labels, scale, IGNORE_INDEX, z_loss)
    torch.testing.assert_close(ops.cross_entropy_with_grad_(found, labels, scale, IGNORE_INDEX, z_loss), losses)
    torch.testing.assert_close(found, expected)
    half = logits[:, 20:].clone()  # as a rank with a part of the vocabulary has it
    whole = logits.clone()
    logsumexp = torch.logsumexp(logits.float(), -1)
    ops.cross_entropy_grad_(half, labels, 20, logsumexp, scale, IGNORE_INDEX, z_loss)
    REFERENCE.cross_entropy_grad_(whole, labels, 0, logsumexp, scale, IGNORE_INDEX, z_loss)
    torch.testing.assert_close(half, whole[:, 20:])


aten = torch.ops.aten
WAITING = (
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.lift_fresh,
)  # fmt: skip


class Waits(TorchDispatchMode):
    """Records every operator with which the host reads a number from the device, and every tensor made from a Python
    list: on CUDA each of them waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


PATHS = {
    "fsdp": FSDP,
    "masters": MASTERS,
    "masters, one pass": MASTERS | COMPILED | {"compile.components": ["optimizer"]},
    "float32": {},
}


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_never_waits_for_the_device(world: World, options: dict[str, Any], passes: int) -> None:
    trained, config = train(options, passes, steps=2), config_of(options, passes)
    batches, bad = batches_of(0, passes), torch.tensor(0.0)
    if isinstance(trained.optimizer, OnePassAdamW) and trained.optimizer._update is not None:
        trained.optimizer._update = update  # compiled code cannot be watched
    degrees = mesh_degrees(config.parallelism, 1)
    with Waits() as waits:
        loss = forward_backward(trained.model, batches, one_over_valid_tokens(batches, degrees))
        clip_gradients(trained.optimizer, config.training.max_norm, loss)
        step_unless(trained.optimizer, bad)
        trained.optimizer.zero_grad(set_to_none=True)
    assert waits.seen == []
    with Waits() as waits:
        _ = loss.item(), torch.tensor([1.0])
    assert len(waits.seen) == 2


TORCH_LOSS, MISSING = {"loss.implementation": "torch"}, "has no torch.nn.functional"
BUDGET = {"activation_checkpoint.mode": "memory_budget"}
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "masters of two devices": (MASTERS, 2, "masters is for one device, and there are 2"),
    "masters in float32": ({"parallelism.single_device": "masters"}, 1, "computes in float32"),
    "masters and offload": (MASTERS | {"training.enable_cpu_offload": True}, 1, "enable_cpu_offload"),
    "model with FSDP": (FSDP | COMPILED | {"compile.components": ["model"]}, 1, "FSDP2 gathers weights"),
    "foreach with masters": (MASTERS | {"optimizer.implementation": "foreach"}, 1, "masters has a step of its own"),
    "for-loop compiled": (COMPILED | {"compile.components": ["optimizer"], "optimizer.implementation": "for-loop"}, 1,
                          "implementation is for-loop, and compile.components with optimizer"),
    "model and blocks": (COMPILED | {"compile.components": ["model", "blocks"]}, 1, "which contains blocks"),
    "no such backend": (COMPILED | {"compile.backend": "inducto"}, 1,
                        "no compile.backend 'inducto'; did you mean inductor"),
    "a backend without its package": (COMPILED | {"compile.backend": "tvm"}, 1,
                                      "compile.backend 'tvm' needs the package tvm; install it, or use inductor"),
    "tuning without Inductor": (COMPILED | {"compile.max_autotune": True}, 1, "compile.backend is 'aot_eager'"),
    "torch's loss with z": (TORCH_LOSS | {"loss.z_loss": 1e-4}, 1, "no z_loss" if has_torch_loss() else MISSING),
    "torch's loss of a slice": (TORCH_LOSS | {"parallelism.tensor_parallel_degree": 2}, 2,
                                "tensor_parallel_degree is 2" if has_torch_loss() else MISSING),
    "torch's loss by our kernel": (TORCH_LOSS | {"kernels.cross_entropy": "triton"}, 1,
                                   "kernels.cross_entropy is 'triton'" if has_torch_loss() else MISSING),
    "a budget without a compiler": (BUDGET, 1, "compile.enable is False"),
    **{f"a budget by {name}": (COMPILED | BUDGET | {"compile.backend": name}, 1, f"compile.backend is '{name}'")
       for name in ("eager", "eager_noexcept", "aot_eager_default_partitioner", "cudagraphs")},
    "a budget of the whole model": (COMPILED | BUDGET | {"compile.components": ["model"]}, 1, "components has model"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    options, devices, sentence = REFUSED[name]
    config = config_of(options)
    with pytest.raises(ConfigError, match=sentence):
        parallel.check(config, LLAMA3, mesh_degrees(config.parallelism, devices), CPU)


def test_flash_attention_3_that_is_not_there_is_refused() -> None:
    config = config_of({"kernels.attention": "fa3"})
    with pytest.raises(ConfigError, match="'fa3' exists on CUDA only"):
        build_ops(config.kernels, CPU, workload(config, LLAMA3, mesh_degrees(config.parallelism, 1)))


def tagged(tag: str) -> AbstractContextManager[None]:
    return torch.compiler.config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]


def test_compiled_code_is_kept_where_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including a block's traced graph, except where tensor parallel ranks would use each other's."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    settings = Compile(enable=True, components=("blocks",), cache_folder=str(tmp_path))
    model = Llama(dataclasses.replace(LLAMA3, n_layers=1))
    compilation.compile_model(model, settings)
    with tagged("a user's own"), inductor.patch(unsafe_marked_cacheable_functions={}):
        compilation.keep_code(settings, tensor_degree=2)
        assert not inductor.unsafe_marked_cacheable_functions
        compilation.keep_code(settings, tensor_degree=1)
        for _ in range(2):
            torch._dynamo.reset()
            counters.clear()
            model(torch.arange(8)[None]).sum().backward()
    assert any(path.is_file() for path in (tmp_path / "inductor").rglob("*"))
    assert counters["aot_autograd"]["autograd_cache_hit"] == counters["aot_autograd"]["total"] == 1
    assert counters["inductor"]["fxgraph_cache_hit"] == 2


def test_compiled_code_is_not_kept_beyond_a_change_of_an_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would go on with the derivative that the operator had when the graph was made."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "elsewhere")
    settings = Compile(enable=True, cache_folder=str(tmp_path))
    x = torch.ones(8, requires_grad=True)
    gradients = []
    with tagged(""):
        for factor in (2.0, 2.0, 3.0):
            monkeypatch.setattr(compilation, "source_digest", lambda factor=factor: f"factor {factor}")
            compilation.keep_code(settings, tensor_degree=1)
            torch._dynamo.reset()
            doubled = torch.library.custom_op("titan_fast_test::doubled", mutates_args=())(_doubled)
            doubled.register_fake(torch.empty_like)
            doubled.register_autograd(lambda _, gradient, factor=factor: factor * gradient)
            total = torch.compile(lambda x, doubled=doubled: doubled(x).sum(), **compilation.arguments(settings))
            gradients += torch.autograd.grad(total(x), x)
    assert [gradient[0].item() for gradient in gradients] == [2.0, 2.0, 3.0]


def test_nothing_that_compiles_our_operators_uses_another_versions_code(tmp_path: Path) -> None:
    """Tests and benchmarks keep compiled code as well."""
    digest = source_digest()
    assert digest in torch.compiler.config.cache_key_tag
    assert environment_of_children(tmp_path)["TORCH_COMPILE_CACHE_KEY_TAG"] == digest
    with tagged(""):
        kernel_suite.pytest_configure(cast(Any, SimpleNamespace(getoption=lambda name: False)))
        assert torch.compiler.config.cache_key_tag == digest


def _doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_gradients_of_passes_are_summed_in_float32(world: World) -> None:
    trained = train(MASTERS, passes=2, steps=1)
    batches = batches_of(0, 2)
    forward_backward(trained.model, batches, torch.tensor(0.1))
    assert all(p.grad is None for p in trained.model.parameters())
    assert {gradient_of(p).dtype for p in trained.model.parameters()} == {torch.float32}  # type: ignore[union-attr]
    trained.optimizer.zero_grad()
    assert all(gradient_of(p) is None for p in trained.model.parameters())


def test_gradients_are_widened_a_bucket_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "BUCKET_NUMEL", 10)
    buckets = masters._buckets([torch.empty(numel) for numel in (20, 4, 6, 1, 30, 3)])
    assert [[tensor.numel() for tensor in bucket] for bucket in buckets] == [[20], [4, 6], [1], [30], [3]]
