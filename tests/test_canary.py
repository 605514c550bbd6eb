"""The comparison of compiled with eager gradients at the start of a compiled run."""

import dataclasses
import gc
import re
import weakref
from typing import Any

import pytest
import torch

from titan_fast import canary, wide_products
from titan_fast.canary import check, check_compiled_gradients, exact_ops
from titan_fast.config import Compile, MeshDegrees, from_options
from titan_fast.errors import ConfigError, NumericsError
from titan_fast.flavors import FLAVORS
from titan_fast.ops import REFERENCE, with_equal_heads

SHAPE = dataclasses.replace(FLAVORS["debug"], dim=32, n_heads=2, n_kv_heads=1, ffn_dim=48)


class WrongWhenCompiled(torch.autograd.Function):
    """The identity, with a gradient that is 1% too small."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return dy * 0.99


def test_the_canary_compares_gradients_that_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SHAPE, REFERENCE, Compile(enable=True, backend="aot_eager"), torch.bfloat16, torch.device("cpu"), 2, 16
    torch._dynamo.reset()
    assert 0 < check_compiled_gradients(*arguments, wide=True) < 0.05

    def wrong(ctx: Any, dy: torch.Tensor) -> Any:
        dx, nothing, dw = right(ctx, dy)
        return dx, nothing, dw * 0.8 if dw is not None and dw.shape[0] == SHAPE.ffn_dim else dw

    right = wide_products._Linear.backward
    monkeypatch.setattr(wide_products._Linear, "backward", staticmethod(wrong))
    torch._dynamo.reset()
    with pytest.raises(NumericsError, match=r"gradient of feed_forward.(gate|up).weight"):
        check_compiled_gradients(*arguments, wide=True)
    options = {"compile.enable": "True", "compile.backend": "aot_eager", "training.mixed_precision_param": "bfloat16"}
    options |= {"training.seq_len": "16", "parallelism.fsdp_wide_gradients": "True"}
    torch._dynamo.reset()
    with pytest.raises(NumericsError, match=r"gradient of feed_forward.(gate|up).weight"):
        settings = from_options({key: [value] for key, value in options.items()})
        check(settings, SHAPE, REFERENCE, MeshDegrees(1, 2, 1), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_canary_finds_a_wrong_compiled_gradient(dtype: torch.dtype) -> None:
    cpu, settings = torch.device("cpu"), Compile(enable=True, backend="aot_eager")
    torch._dynamo.reset()  # earlier tests compiled the same code, and there is a limit to how often
    assert check_compiled_gradients(SHAPE, REFERENCE, settings, dtype, cpu, 2, 16) < 0.05

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        wrong = WrongWhenCompiled.apply(gate) if torch.compiler.is_compiling() else gate
        return REFERENCE.swiglu(wrong if dtype == torch.float32 else wrong * 1.0, up)

    broken = dataclasses.replace(REFERENCE, swiglu=swiglu)
    if dtype == torch.bfloat16:
        WrongWhenCompiled.backward = staticmethod(lambda ctx, dy: dy * 0.8)  # type: ignore[method-assign]
    torch._dynamo.reset()
    with pytest.raises(NumericsError, match=rf"gradient of .*gate.*torch {re.escape(torch.__version__)}") as caught:
        check_compiled_gradients(SHAPE, broken, settings, dtype, cpu, 2, 16)
    assert caught.value.exit_status == 5


def test_the_comparison_needs_eager_memory_of_a_single_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that recomputes, or whose ranks share a batch, has no room for more. Sums are over the whole batch."""
    seen, true_gradients = [], canary._gradients

    def gradients(block: torch.nn.Module, x: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        seen.append((x.dtype, len(x)))
        return true_gradients(block, x, *rest)

    monkeypatch.setattr(canary, "_gradients", gradients)
    settings = Compile(enable=True, backend="aot_eager")
    torch._dynamo.reset()
    error = check_compiled_gradients(SHAPE, REFERENCE, settings, torch.float32, torch.device("cpu"), 3, 16)
    assert 0 < error < 1e-5 and seen == [(torch.float32, 1)] * 3 + [(torch.float32, 3)]


def test_the_comparison_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[weakref.ref[torch.nn.Module]] = []
    true_block = canary._block

    def block(*arguments: Any) -> torch.nn.Module:
        made = true_block(*arguments)
        blocks.append(weakref.ref(made))
        return made

    monkeypatch.setattr(canary, "_block", block)
    options = {"compile.enable": ["True"], "compile.backend": ["aot_eager"], "training.seq_len": ["16"]}
    torch._dynamo.reset()
    gc.disable()
    try:
        check(from_options(options), SHAPE, REFERENCE, MeshDegrees(1, 1, 1), torch.device("cpu"))
    finally:
        gc.enable()
    assert blocks and not any(made() for made in blocks)


@pytest.mark.parametrize(("tensor", "sequences"), [(1, 12), (8, 1)])
def test_the_comparison_takes_a_ranks_part_of_a_batch(
    tensor: int, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[Any] = []
    monkeypatch.setattr(canary, "check_compiled_gradients", lambda *arguments, **_: sizes.append(arguments[-2:]))
    config = from_options({"compile.enable": ["True"], "training.local_batch_size": ["12"]})
    check(config, SHAPE, REFERENCE, MeshDegrees(1, 1, tensor), torch.device("cpu"))
    assert sizes == [(sequences, config.training.seq_len)]


def test_a_comparison_that_does_not_fit_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(canary, "check_compiled_gradients", full)
    config = from_options({"compile.enable": ["True"], "training.local_batch_size": ["3"]})
    with pytest.raises(ConfigError, match=r"comparison of a compiled block.*2\.00 GiB.*\(now 3\).*canary False"):
        check(config, SHAPE, REFERENCE, MeshDegrees(1, 1, 1), torch.device("cpu"))


def test_repeated_heads_are_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, generator=generator, requires_grad=True) for heads in (6, 2, 2))
    expected = REFERENCE.attention(q, k, v)
    found = with_equal_heads(REFERENCE.attention)(q, k, v)
    torch.testing.assert_close(found, expected)
    dy = torch.randn(expected.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_the_canary_makes_no_matrix_of_all_scores() -> None:
    """Which would be 4 GiB here, and 32 GiB for the batch of a shipped config."""
    device = torch.device("cuda", 0)
    shape, (batch, seq_len) = dataclasses.replace(SHAPE, n_heads=4, dim=64), (4, 8192)
    assert exact_ops(device) is not REFERENCE
    torch.cuda.init()  # before which there is no peak to reset
    torch.cuda.reset_peak_memory_stats(device)
    settings = Compile(enable=True, backend="aot_eager")
    check_compiled_gradients(shape, REFERENCE, settings, torch.bfloat16, device, batch, seq_len)
    assert torch.cuda.max_memory_allocated(device) < 2**30
