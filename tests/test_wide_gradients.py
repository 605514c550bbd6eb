"""Weight gradients that leave their products in float32."""

from typing import Any

import pytest
import torch
from shapes import LLAMA3
from small_runs import Trace, build, config_of, own_batches, train
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from worlds import Task, World, results, run_world

from titan_fast import direct_fsdp, parallel, wide_gradients
from titan_fast.config import Config, from_options, mesh_degrees, model_shape
from titan_fast.errors import ConfigError
from titan_fast.model import Linear, Llama
from titan_fast.ops import REFERENCE
from titan_fast.step import forward_backward, one_over_valid_tokens

CPU = torch.device("cpu")
WIDE = {"training.mixed_precision_param": "bfloat16", "parallelism.fsdp_buffers": "direct"}
NARROW = WIDE | {"parallelism.fsdp_wide_gradients": False}
HSDP = {"parallelism.data_parallel_replicate_degree": 2}
TRACED = {"compile.enable": True, "compile.backend": "aot_eager", "compile.components": "blocks"}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "traced": TRACED,
    "traced, pointwise": TRACED | {"activation_checkpoint.mode": "pointwise"},
    "full": {"activation_checkpoint.mode": "full", "parallelism.fsdp_wide_gradients": True},
    "offloaded": {"training.enable_cpu_offload": True},
    "never resharded": {"parallelism.fsdp_reshard_after_forward": "never"},
}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_the_gradient_is_the_product_unrounded() -> None:
    torch.manual_seed(0)
    linear = Linear(48, 40, REFERENCE).bfloat16()
    x, dy = torch.randn(3, 5, 48).bfloat16().requires_grad_(), torch.randn(3, 5, 40).bfloat16()
    exact = torch.einsum("bso,bsi->oi", dy.double(), x.double())
    narrow_y = linear(x)
    narrow_y.backward(dy)
    narrow, narrow_dx, x.grad = linear.weight.grad, x.grad, None
    linear.weight.grad = None
    wide_gradients.widen(linear, torch.float32, CPU)
    assert isinstance(linear, wide_gradients.WideLinear)
    wide_y = linear(x)
    wide_y.backward(dy)
    assert torch.equal(wide_y, narrow_y) and x.grad is not None and narrow_dx is not None
    assert torch.equal(x.grad, narrow_dx)
    assert linear.weight.grad is None and linear.port.grad is not None and narrow is not None
    assert relative_error(linear.port.grad, exact) < 1e-6
    assert relative_error(narrow, exact) > 1e-4
    assert linear.port.untyped_storage().nbytes() == 4
    assert [name for name, _ in linear.named_parameters()] == ["weight"] and list(linear.state_dict()) == ["weight"]


def test_it_can_be_taken_back() -> None:
    linear = Linear(4, 4, REFERENCE).bfloat16()
    wide_gradients.widen(linear, torch.float32, CPU)
    wide_gradients.unwiden(linear)
    linear(torch.ones(1, 4).bfloat16()).sum().backward()
    assert linear.weight.grad is not None and not hasattr(linear, "port")


def trained(world: World, options: dict[str, Any]) -> Trace:
    return train(world, LLAMA3, options, passes=2, steps=6)


def a_step(model: Llama, options: dict[str, Any], world: World) -> None:
    config = config_of(options, world.size)
    batches = own_batches(config, world, 0, LLAMA3.vocab_size)
    forward_backward(model, batches, one_over_valid_tokens(batches, mesh_degrees(config.parallelism, world.size)))


def reduced(world: World, options: dict[str, Any]) -> list[tuple[bool, bool, bool]]:
    """For every weight that is reduced except the embedding: (it is a matrix, it is reduced from its own memory, its
    gradient has more than bfloat16 can hold)."""
    model, found = build(config_of(options, world.size), LLAMA3, world), []
    reduce = direct_fsdp.DirectReduceScatter.reduce_each

    def noted(self: Any, outputs: list[Tensor], inputs: list[Tensor], group: Any, op: Any) -> None:
        if len(inputs) > 1:
            for one in inputs:
                alone = one.untyped_storage().nbytes() == one.numel() * one.element_size()
                found.append((one.numel() > LLAMA3.dim, alone, not torch.equal(one, one.bfloat16().float())))
        reduce(self, outputs, inputs, group, op)

    direct_fsdp.DirectReduceScatter.reduce_each = noted  # type: ignore[method-assign]
    try:
        a_step(model, options, world)
    finally:
        direct_fsdp.DirectReduceScatter.reduce_each = reduce  # type: ignore[method-assign]
    return found


def units_with_matrices(model: Llama) -> list[Any]:
    """FSDP2's records of the units with matrices."""
    return [module._get_fsdp_state()._fsdp_param_group for module in (*model.blocks, model.head)]  # type: ignore[operator]


def switched(world: World) -> list[bool]:
    """For a model that is built narrow, switched to wide, and back: whether all gradients are those of one that was
    built that way, and whether FSDP2 is changed exactly when it is wide."""
    narrow, wide = (build(config_of(options, world.size), LLAMA3, world) for options in (NARROW, WIDE))
    one, equal = build(config_of(NARROW, world.size), LLAMA3, world), []
    for options, other in ((WIDE, wide), (NARROW, narrow)):
        config = config_of(options, world.size)
        parallel.set_fsdp_policy(one, config, mesh_degrees(config.parallelism, world.size), CPU)
        for model in (one, other):
            a_step(model, options, world)
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        equal.append(all(torch.equal(a.grad.to_local(), b.grad.to_local()) for a, b in pairs))  # type: ignore[union-attr]
        equal.append(all(("post_backward" in vars(unit)) == (options is WIDE) for unit in units_with_matrices(one)))
        one.zero_grad()
    return equal


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    kinds = {"narrow": NARROW, "exact": {}}
    tasks = [Task(name, trained, (options,)) for name, options in kinds.items()]
    tasks += [Task(f"wide, {name}", trained, (WIDE | way,)) for name, way in WAYS.items()]
    tasks += [Task(f"reduced {i}", reduced, (options,)) for i, options in enumerate((NARROW, WIDE))]
    found = run_world(2, [*tasks, Task("switched", switched)], tmp_path_factory.mktemp("world"))
    hsdp = [Task(f"{name}, HSDP", trained, (options | HSDP,)) for name, options in (kinds | {"wide": WIDE}).items()]
    return found | run_world(4, hsdp, tmp_path_factory.mktemp("replicas"))


def test_matrices_are_reduced_from_where_they_were_made(found: dict[str, list[Any]]) -> None:
    for rank in results(found, "reduced 0"):
        assert rank and not any(alone or wide for _, alone, wide in rank)
    for rank in results(found, "reduced 1"):
        assert rank and all(alone and wide for is_matrix, alone, wide in rank if is_matrix)
        assert not any(wide for is_matrix, _, wide in rank if not is_matrix)


@pytest.mark.parametrize("names", [("exact", "narrow", "wide, plain"), ("exact, HSDP", "narrow, HSDP", "wide, HSDP")])
def test_a_run_trains_as_in_float32(found: dict[str, list[Any]], names: tuple[str, str, str]) -> None:
    """Both bfloat16 runs differ by the rounding of their activations."""
    exact, narrow, wide = (results(found, name)[0] for name in names)
    for one in (narrow, wide):
        assert one.losses == pytest.approx(exact.losses, abs=3e-3)
    assert wide.norms == pytest.approx(narrow.norms, rel=2e-3) and wide.norms != narrow.norms


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_however_blocks_run(found: dict[str, list[Any]], way: str) -> None:
    for plain, other in zip(results(found, "wide, plain"), results(found, f"wide, {way}"), strict=True):
        assert other.losses == plain.losses and other.norms == plain.norms
        assert all(torch.equal(other.last[name], weight) for name, weight in plain.last.items())


def test_a_built_model_can_be_switched(found: dict[str, list[Any]]) -> None:
    assert results(found, "switched") == [[True] * 4] * 2


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        ({}, 1, "needs several shards; turn it off"),
        (
            {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1},
            2,
            "needs sever",
        ),
        ({"parallelism.tensor_parallel_degree": 2}, 4, "does not work with tensor_parallel_degree 2; use one of them"),
        ({"training.mixed_precision_param": "float32"}, 2, "computes in float32 and reduces in float32; turn"),
        (
            {"training.mixed_precision_reduce": "bfloat16"},
            2,
            "computes in bfloat16 and reduces in bfloat16; turn",
        ),
        ({"parallelism.fsdp_buffers": "flat"}, 2, "they are flat; use --parallelism.fsdp_buffers direct"),
        (
            {"float8.enable": True, "float8.recipe_name": "rowwise"},
            2,
            "does not work with float8.recipe_name rowwise, whose products are bfloat16; use tensorwise",
        ),
        ({"kernels.reemit": "triton"}, 2, "does not work with kernels.reemit 'triton'"),
        (
            {"activation_checkpoint.mode": "memory_budget", "compile.enable": True},
            2,
            "does not work with activation_checkpoint.mode memory_budget, .*; use another mode",
        ),
    ],
)
def test_what_it_cannot_do_is_said_and_not_done_unasked(options: dict[str, Any], ranks: int, said: str) -> None:
    degrees = mesh_degrees(settings_of(WIDE | options).parallelism, ranks)
    assert not parallel.gradients_are_wide(settings_of(WIDE | options), degrees, CPU)
    settings = settings_of(WIDE | options | {"parallelism.fsdp_wide_gradients": True})
    with pytest.raises(ConfigError, match="parallelism.fsdp_wide_gradients .*" + said):
        parallel.check(settings, model_shape(settings.model), degrees, CPU)


def test_another_fsdp2_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, name) = wide_gradients._USED[1]
    monkeypatch.delattr(FSDPParam, name)
    two = mesh_degrees(settings_of({}).parallelism, 2)
    assert not parallel.gradients_are_wide(settings_of(WIDE), two, CPU)
    settings = settings_of(WIDE | {"parallelism.fsdp_wide_gradients": True})
    with pytest.raises(ConfigError, match=rf"needs FSDP2's FSDPParam\.{name}, which torch"):
        parallel.check(settings, model_shape(settings.model), two, CPU)


def settings_of(options: dict[str, Any]) -> Config:
    return from_options({key: [str(value)] for key, value in options.items()})


def test_it_is_done_unasked_where_it_can_be() -> None:
    two, gpu = mesh_degrees(settings_of({}).parallelism, 2), torch.device("cuda")
    assert parallel.gradients_are_wide(settings_of({}), two, gpu)
    assert not parallel.gradients_are_wide(settings_of({}), two, CPU)  # float32, flat buffers
    assert parallel.gradients_are_wide(settings_of(WIDE), two, CPU)
    assert not parallel.gradients_are_wide(settings_of(NARROW), two, gpu)
    float8 = settings_of({"float8.enable": True})
    assert not parallel.gradients_are_wide(float8, two, gpu)
    full = settings_of({"activation_checkpoint.mode": "full"})
    assert not parallel.gradients_are_wide(full, two, gpu)
    assert parallel.gradients_are_wide(settings_of({"activation_checkpoint.mode": "full"} | TRACED), two, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled: bool) -> None:
    """With real sizes, and a product that the compiler calls."""
    device = torch.device("cuda", 0)
    linear = Linear(1024, 1536, REFERENCE).to(device, torch.bfloat16)
    wide_gradients.widen(linear, torch.float32, device)
    if compiled:
        linear.compile(fullgraph=True)
    x = torch.randn(2, 512, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(2, 512, 1536, device=device, dtype=torch.bfloat16)
    linear(x).backward(dy)
    assert isinstance(linear, wide_gradients.WideLinear)
    assert linear.port.grad is not None and linear.port.grad.dtype == torch.float32 and x.grad is not None
    assert relative_error(linear.port.grad, torch.einsum("bso,bsi->oi", dy.double(), x.double())) < 1e-5
    assert relative_error(x.grad, dy.double() @ linear.weight.double()) < 5e-3
