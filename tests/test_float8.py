"""Matrix products in float8, compared with float64 by the error that the formats' own rounding makes."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from shapes import LLAMA3
from small_runs import build, config_of, named_whole, own_batches, train
from torch import Tensor
from worlds import CPU, Task, World, results, run_world

from titan_fast import float8, parallel, step
from titan_fast.canary import check_compiled_gradients
from titan_fast.config import Comm, Compile, mesh_degrees, model_shape, parse
from titan_fast.distributed import start
from titan_fast.errors import ConfigError
from titan_fast.ops import REFERENCE, Workload, build_ops

ROWWISE = pytest.param(
    "rowwise", marks=pytest.mark.skipif(not float8.cpu_has_rowwise(), reason="this torch scales by rows on CUDA only")
)
RECIPES = ("tensorwise", ROWWISE)
# A mantissa of m bits is off by 2^-(m + 1) at most, and as a root mean square over random values by a little less than
# 2^-(m + 2). Two independent operands of a product add in squares, whatever its inner size.
ROUNDING = {torch.float8_e4m3fn: 2.0**-5, torch.float8_e5m2: 2.0**-4}
SHAPE = dataclasses.replace(LLAMA3, dim=64, n_heads=4, n_kv_heads=2, ffn_dim=96)
ON = {"float8.enable": True}


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    with start(Comm(), CPU) as world:
        yield world


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def both(a: torch.dtype, b: torch.dtype) -> float:
    return math.hypot(ROUNDING[a], ROUNDING[b])


def values(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def run(recipe: str, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = float8.linear_with(recipe)(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return y.detach(), dx, dweight


def test_one_scale_for_a_gradient_leaves_its_small_numbers() -> None:
    """Numbers 2^24 times smaller than the largest, which are 2^6 times too small for e4m3."""
    dy = torch.tensor([[1.0, 2.0**-24]])
    found = float8.rounded(dy, float8.GRADIENT["tensorwise"], "tensorwise")
    torch.testing.assert_close(found.values.float() / found.scale, dy, rtol=2.0**-3, atol=0.0)


@pytest.mark.parametrize("columns", [float8._WIDE - 16, float8._WIDE])
def test_the_scale_of_a_tensor_is_by_its_largest_number(columns: int) -> None:
    """Wide rows are reduced one by one."""
    x = torch.randn(32, columns)
    x[17, columns - 1] = -12.0
    assert float8.rounded(x, float8.FORWARD, "tensorwise").scale.item() == pytest.approx(448.0 / 12.0)
    x[3, 5] = torch.nan
    assert float8.rounded(x, float8.FORWARD, "tensorwise").scale.isnan()


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_as_right_as_their_rounding(recipe: str, dtype: torch.dtype, magnitude: float) -> None:
    if magnitude < 1e-12:
        magnitude = 1e-10  # below that everything counts as zeros
    x, weight = values(3, 32, 64, scale=magnitude, dtype=dtype), values(48, 64, scale=0.1, dtype=dtype, seed=1)
    dy = values(3, 32, 48, scale=1e-3, dtype=dtype, seed=2)
    y, dx, dweight = run(recipe, x, weight, dy)
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype,) * 3
    rows, wide, gradient = x.double().flatten(0, 1), weight.double(), dy.double().flatten(0, 1)
    forward, backward = both(float8.FORWARD, float8.FORWARD), both(float8.FORWARD, float8.GRADIENT[recipe])
    for found, exact, bound in (
        (y.flatten(0, 1), rows @ wide.t(), forward),
        (dx.flatten(0, 1), gradient @ wide, backward),
        (dweight, gradient.t() @ rows, backward),
    ):
        assert bound / 3 < error(found, exact) < bound  # not below: it would not be float8


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products_of_real_sizes_on_a_gpu(recipe: str, compiled: bool) -> None:
    """The narrowest and the widest matrix of the 8B's blocks, and a row count that is 16 times a prime."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = float8.linear_with(recipe)
    if compiled:
        linear = torch.compile(linear, fullgraph=True, dynamic=False)
    forward, backward = both(float8.FORWARD, float8.FORWARD), both(float8.FORWARD, float8.GRADIENT[recipe])
    for rows, columns, inner in ((8192, 4096, 4096), (16 * 509, 14_336, 4096), (2048, 4096, 14_336)):
        x = torch.randn(rows, inner, dtype=torch.bfloat16, device="cuda").requires_grad_()
        weight = (0.02 * torch.randn(columns, inner, dtype=torch.bfloat16, device="cuda")).requires_grad_()
        dy = 1e-4 * torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        y = linear(x, weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        with torch.no_grad():
            for found, exact, bound in (
                (y, x.float() @ weight.float().t(), forward),
                (dx, dy.float() @ weight.float(), backward),
                (dweight, dy.float().t() @ x.float(), backward),
            ):
                assert bound / 3 < error(found, exact.double()) < bound
            if recipe == "tensorwise":
                port = torch.zeros(columns, inner, device="cuda", requires_grad=True)
                with torch.enable_grad():
                    (wide,) = torch.autograd.grad(linear(x, weight, port), port, dy)
                assert wide.dtype == torch.float32 and error(wide, dweight.double()) < 2 * 2.0**-9
            # A single token, as in sampling: without gradients the number of rows need not be divisible.
            assert error(linear(x[:1], weight), x[:1].double() @ weight.double().t()) < 1.5 * forward


@pytest.mark.skipif(not float8.cpu_has_rowwise(), reason="this torch scales by rows on CUDA only")
def test_one_large_token_hurts_others_only_with_one_scale() -> None:
    x, weight = values(32, 64), values(48, 64, scale=0.1, seed=1)
    x[0] *= 1e6
    exact = x[1:].double() @ weight.double().t()
    worst = {recipe: error(float8.linear_with(recipe)(x, weight)[1:], exact) for recipe in ("tensorwise", "rowwise")}
    assert worst["rowwise"] < both(float8.FORWARD, float8.FORWARD) < worst["tensorwise"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_give_zeros_and_what_is_not_finite_shows(recipe: str) -> None:
    x, weight, dy = torch.zeros(16, 32), values(48, 32), values(16, 48, seed=1)
    y, dx, dweight = run(recipe, x, weight, dy)
    assert not y.any() and not dweight.any() and dx.isfinite().all()
    for bad in (math.inf, -math.inf, math.nan):
        x[3, 5] = bad
        y, _, dweight = run(recipe, x, weight, dy)
        assert not y[3].isfinite().any() and not dweight[:, 5].isfinite().any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_of_any_subset(recipe: str) -> None:
    x, weight, dy = values(16, 32), values(48, 32, seed=1), values(16, 48, seed=2)
    _, dx, dweight = run(recipe, x, weight, dy)
    for wanted in (True, False):
        ours, theirs = x.clone().requires_grad_(wanted), weight.clone().requires_grad_(not wanted)
        float8.linear_with(recipe)(ours, theirs).backward(dy)
        assert torch.equal(*((ours.grad, dx) if wanted else (theirs.grad, dweight)))  # type: ignore[arg-type]


def test_a_weights_gradient_can_leave_in_float32() -> None:
    sizes = enumerate(((32, 64), (48, 64), (32, 48)))
    x, weight, dy = (values(*size, dtype=torch.bfloat16, seed=seed) for seed, size in sizes)
    y, dx, narrow = run("tensorwise", x, weight, dy)
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    port = torch.zeros(48, 64, requires_grad=True)
    found = float8.linear_with("tensorwise")(x, weight, port)
    found.backward(dy)
    assert torch.equal(found, y) and x.grad is not None and torch.equal(x.grad, dx)
    assert weight.grad is None and port.grad is not None
    assert torch.equal(port.grad.bfloat16(), narrow) and not torch.equal(port.grad, narrow.float())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_learns_with_it_as_without(alone: World, recipe: str) -> None:
    plain, ours = train(alone, SHAPE, {}, steps=8), train(alone, SHAPE, ON | {"float8.recipe_name": recipe}, steps=8)
    assert ours.losses != plain.losses
    assert ours.losses == pytest.approx(plain.losses, rel=1e-2)
    assert ours.norms == pytest.approx(plain.norms, rel=0.1)


@pytest.mark.parametrize("mode", ["full", "selective", "pointwise"])
def test_recomputation_changes_nothing(alone: World, mode: str) -> None:
    kept, again = (train(alone, SHAPE, ON | {"activation_checkpoint.mode": m}, steps=2) for m in ("none", mode))
    assert (kept.losses, kept.norms) == (again.losses, again.norms)
    assert all(torch.equal(kept.last[name], again.last[name]) for name in kept.last)


def gradients(world: World, options: dict[str, Any]) -> dict[str, Tensor]:
    """Of one step on random tokens, whole, by name."""
    config = config_of(options, world.size)
    model, degrees = build(config, SHAPE, world), mesh_degrees(config.parallelism, world.size)
    batches = own_batches(config, world, 0, SHAPE.vocab_size)
    step.forward_backward(model, batches, step.one_over_valid_tokens(batches, degrees))
    return named_whole(model, gradients=True)


LAYOUTS = {
    "FSDP": {"parallelism.data_parallel_shard_degree": 2},
    "TP": {"parallelism.tensor_parallel_degree": 2},
    "TP, rowwise": {"parallelism.tensor_parallel_degree": 2, "float8.recipe_name": "rowwise"},
    "TP, traced, pointwise": {
        "parallelism.tensor_parallel_degree": 2, "activation_checkpoint.mode": "pointwise",
        "compile.enable": True, "compile.backend": "aot_eager",
    },
}  # fmt: skip
BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
WIDE = BFLOAT16 | {"parallelism.fsdp_buffers": "direct", "parallelism.fsdp_wide_gradients": True}
LAYOUTS_OF_BFLOAT16 = {
    "wide": WIDE,
    "wide, traced, full": WIDE | {
        "activation_checkpoint.mode": "full", "compile.enable": True, "compile.backend": "aot_eager",
    },
}  # fmt: skip
if not float8.cpu_has_rowwise():
    del LAYOUTS["TP, rowwise"]


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    layouts = LAYOUTS | LAYOUTS_OF_BFLOAT16 | {"narrow": BFLOAT16}
    tasks = [Task(name, gradients, (ON | options,)) for name, options in layouts.items()]
    return run_world(2, tasks, tmp_path_factory.mktemp("float8"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_as_right_as_one_process(alone: World, of_two_processes: dict[str, Any], layout: str) -> None:
    """Each rank has its own scales, so gradients do not equal one process's, but are as close to the exact ones."""
    exact, one = gradients(alone, {}), gradients(alone, ON)
    found = results(of_two_processes, layout)[0]
    for name, gradient in exact.items():
        assert error(found[name], gradient.double()) < 1.5 * error(one[name], gradient.double()) + 1e-6, name
    assert error(found["blocks.0.attention.qkv.weight"], exact["blocks.0.attention.qkv.weight"].double()) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS_OF_BFLOAT16)
def test_ranks_make_gradients_in_float32(alone: World, of_two_processes: dict[str, Any], layout: str) -> None:
    """As close to the exact ones as those rounded to bfloat16, and different from them."""
    exact, narrow, wide = gradients(alone, {}), *(results(of_two_processes, name)[0] for name in ("narrow", layout))
    for name, gradient in exact.items():
        assert error(wide[name], gradient.double()) < 1.1 * error(narrow[name], gradient.double()) + 1e-6, name
    assert not torch.equal(wide["blocks.0.attention.qkv.weight"], narrow["blocks.0.attention.qkv.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_measured_by_eager_float8(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    ops = dataclasses.replace(REFERENCE, linear=float8.linear_with("tensorwise"))
    settings = Compile(enable=True, backend="aot_eager")
    assert 1e-2 < check_compiled_gradients(SHAPE, ops, settings, dtype, CPU, 2, 16) < 0.3


# What it logs and refuses.


def test_the_choice_is_told() -> None:
    work = Workload(SHAPE, 4096, 1, 0, compiled=True, float8="rowwise")
    chosen = {name: (choice, reason) for name, choice, reason in build_ops(parse([]).kernels, CPU, work).reasons}
    assert chosen["linear"][0] == "float8, rowwise"
    assert chosen["reemit"] == ("reference", "its products are not float8")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--training.seq_len", "50", "--training.local_batch_size", "3"], "seq_len x local_batch_size is 150"),
        (["--model.ffn_dim", "1000"], "ffn_dim is 1000"),
        (["--kernels.reemit", "triton"], "kernels.reemit 'triton' joins norms and SwiGLU to products that are not"),
    ],
)
def test_what_it_cannot_do_is_refused(words: list[str], sentence: str) -> None:
    config = parse([*words, "--float8.enable", "True"])
    with pytest.raises(ConfigError) as caught:
        parallel.check(config, model_shape(config.model), mesh_degrees(config.parallelism, 1), CPU)
    assert sentence in str(caught.value)


def test_sizes_count_as_tensor_parallelism_cuts_them() -> None:
    config = parse(["--float8.enable", "True", "--parallelism.tensor_parallel_degree", "4"])
    shape = dataclasses.replace(SHAPE, n_heads=8, n_kv_heads=4)  # 64 + 2 x 32 columns, a quarter of 128
    with pytest.raises(ConfigError, match=r"tensor_parallel_degree 4 has cut them, and ffn_dim is 24"):
        parallel.check(config, shape, mesh_degrees(config.parallelism, 4), CPU)


def test_float32_results_and_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(["--float8.enable", "True", "--training.mixed_precision_param", "float32"])
    with pytest.raises(ConfigError, match=r"mixed_precision_param is float32"):
        parallel.check(config, SHAPE, mesh_degrees(config.parallelism, 1), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 or newer .*NVIDIA A100 has 8\.0"):
        float8.check_device(config.float8, torch.device("cuda"))


def test_a_cpu_without_rowwise_products_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rowwise = dataclasses.replace(parse([]).float8, enable=True, recipe_name="rowwise")
    monkeypatch.setattr(float8, "cpu_has_rowwise", lambda: False)
    float8.check_device(dataclasses.replace(rowwise, recipe_name="tensorwise"), CPU)
    float8.check_device(dataclasses.replace(rowwise, enable=False), CPU)
    with pytest.raises(ConfigError, match=r"'rowwise' is not in torch .*'s products on a CPU"):
        float8.check_device(rowwise, CPU)
