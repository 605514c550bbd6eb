"""Activation checkpointing changes no result; each mode keeps and recomputes what it says, eager and compiled."""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from needs import has_triton
from shapes import LLAMA3
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from benchmarks.activation_memory import compiled, eager
from titan_fast import activation_checkpoint
from titan_fast.activation_checkpoint import apply
from titan_fast.canary import check_compiled_gradients
from titan_fast.compilation import compile_model
from titan_fast.config import ActivationCheckpoint, Compile, Kernels, parse
from titan_fast.errors import ConfigError
from titan_fast.flavors import FLAVORS
from titan_fast.loss import LinearCrossEntropy
from titan_fast.model import Block, Llama, init_weights
from titan_fast.ops import REFERENCE, Ops, Workload, build_ops

MODES = {
    "full": ActivationCheckpoint("full"),
    "every block": ActivationCheckpoint("selective", "1"),
    "every second block": ActivationCheckpoint("selective", "2"),
    "op": ActivationCheckpoint("selective", "op"),
    "attention": ActivationCheckpoint("selective", "attention"),
    "pointwise": ActivationCheckpoint("pointwise"),
}
NONE = ActivationCheckpoint()
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not has_triton(),
    reason="tensors of the CPU take the kernels through the interpreter",
)
CPU = torch.device("cpu")


def gradients(mode: ActivationCheckpoint, ops: Ops = REFERENCE, backend: str | None = None) -> dict[str, Tensor]:
    """Loss and all gradients of one pass."""
    torch._dynamo.reset()
    model = Llama(LLAMA3, ops, LinearCrossEntropy(ops))
    init_weights(model, 0)
    compiles = Compile() if backend is None else Compile(enable=True, backend=backend)
    apply(model, mode, compiles)
    if compiles.enable:
        compile_model(model, compiles)
    tokens = torch.randint(0, LLAMA3.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:], torch.tensor(1 / 32))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("carry", [False, True], ids=["", "carried residual"])
def test_eager_is_bit_for_bit(mode: ActivationCheckpoint, carry: bool) -> None:
    ops = replace(REFERENCE, carry_residual=carry)
    found, expected = gradients(mode, ops), gradients(NONE, ops)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


COMPILED = {
    "none": (NONE, "aot_eager_decomp_partition"),
    "pointwise": (MODES["pointwise"], "inductor"),
    "full": (MODES["full"], "aot_eager_decomp_partition"),
    "op": (MODES["op"], "aot_eager_decomp_partition"),
    "memory budget": (ActivationCheckpoint("memory_budget", memory_budget=0.5), "aot_eager_decomp_partition"),
}


@pytest.mark.parametrize(("mode", "backend"), COMPILED.values(), ids=COMPILED)
def test_compiled_is_close(mode: ActivationCheckpoint, backend: str) -> None:
    expected = gradients(NONE)
    for name, value in gradients(mode, backend=backend).items():
        assert (value - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_a_recomputation_counts_its_own_products() -> None:
    """From 1 again: a block's first product is kept, and is also the first in its recomputation."""
    policy, product = activation_checkpoint.attention_whole(), torch.ops.aten.mm.default
    forward, backward = SimpleNamespace(is_recompute=False), SimpleNamespace(is_recompute=True)
    for context in (forward, backward):
        kept = [policy(context, product) == CheckpointPolicy.MUST_SAVE for _ in range(5)]
        assert kept == [True, False, False, False, False]


# Its three widths (qkv, model, feed-forward) differ, so that a product can be recognised by its width.
SMALL = replace(LLAMA3, ffn_dim=80)


class Calls(TorchDispatchMode):
    """Records the operators that run, and the width of each matrix product's result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function).split(".")[1]
        self.names.append(f"mm {result.shape[-1]}" if name == "mm" else name)
        return result


def again(mode: ActivationCheckpoint, ops: Ops = REFERENCE, keeps_attention: bool = False) -> dict[str, int]:
    """How many times each of a block's forward operators is recomputed in its backward pass."""
    block = Block(SMALL, ops)
    apply(_model_of(block), mode, Compile(), keeps_attention)
    tokens = 29
    rope = torch.ones(tokens, SMALL.head_dim // 2), torch.zeros(tokens, SMALL.head_dim // 2)
    x = torch.randn(1, tokens, SMALL.dim, requires_grad=True)
    with Calls() as forward:
        y, _ = block(x, None, rope)
    counts: dict[str, int] = {}
    with Calls() as backward:
        y.sum().backward()
    plain = _backward_without_checkpoint(ops, rope, tokens)
    for name in set(forward.names):
        if extra := backward.names.count(name) - plain.count(name):
            counts[name] = extra
    return counts


def _model_of(block: Block) -> Any:
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    return model


def _backward_without_checkpoint(ops: Ops, rope: tuple[Tensor, Tensor], tokens: int) -> list[str]:
    x = torch.randn(1, tokens, SMALL.dim, requires_grad=True)
    y, _ = Block(SMALL, ops)(x, None, rope)
    with Calls() as calls:
        y.sum().backward()
    return calls.names


QKV, OUT, UP = f"mm {SMALL.qkv_dim}", f"mm {SMALL.dim}", f"mm {SMALL.ffn_dim}"
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
# What each kind recomputes. Never the down projection, as wide as attention's: nothing needs its result.
PRODUCTS = {
    "full": {QKV: 1, OUT: 1, UP: 2, ATTENTION: 1},
    "op": {OUT: 1, UP: 1},
    "attention": {OUT: 1, UP: 2},
    "pointwise": {},
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_runs_again(name: str) -> None:
    found = again(MODES[name])
    assert {key: count for key, count in found.items() if key in (QKV, OUT, UP, ATTENTION)} == PRODUCTS[name]
    assert found["rsqrt"] == 2 and found["silu"] == 1  # both norms and the gated product


def test_whole_blocks_run_again_without_attention_where_it_must_not() -> None:
    found = again(MODES["full"], keeps_attention=True)
    assert {key: count for key, count in found.items() if key in (QKV, OUT, UP, ATTENTION)} == {QKV: 1, OUT: 1, UP: 2}


@interpreted
@pytest.mark.parametrize("name", ["op", "pointwise"])
def test_the_kernels_run_again_in_every_policy(name: str) -> None:
    kernels = Kernels(rms_norm="triton", rope="triton", swiglu="triton", cross_entropy="reference", reemit="reference")
    ops = build_ops(kernels, CPU, Workload(SMALL, 29, 1, 0, compiled=False))
    found = again(MODES[name], ops)
    assert {key: found.get(key) for key in ("rms_norm", "add_rms_norm", "rope", "swiglu")} == {
        "rms_norm": 1, "add_rms_norm": 1, "rope": 1, "swiglu": 1
    }  # fmt: skip
    assert ATTENTION not in found


@interpreted
@pytest.mark.parametrize("reemit", ["reference", "triton"])
def test_kernels_change_no_number_under_a_policy(reemit: Any) -> None:
    kernels = Kernels(rms_norm="triton", rope="triton", swiglu="triton", cross_entropy="reference", reemit=reemit)
    ops = build_ops(kernels, CPU, Workload(SMALL, 32, 1, 0, compiled=False))
    assert (ops.norm_linear is not None) == (reemit == "triton")
    found, expected = gradients(MODES["pointwise"], ops), gradients(NONE, ops)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


REEMIT = Kernels("reference", "reference", "reference", "reference", reemit="triton")


@interpreted
@pytest.mark.parametrize("carry", [False, True], ids=["", "carried residual"])
@pytest.mark.parametrize("name", ["none", "pointwise"])
def test_re_emitting_units_give_the_same_gradients(name: str, carry: bool) -> None:
    """Compared with plain PyTorch without a checkpoint."""
    ops = build_ops(replace(REEMIT, carry_residual=carry), CPU, Workload(SMALL, 32, 1, 0, compiled=False))
    found, expected = gradients(MODES.get(name, NONE), ops), gradients(NONE)
    assert found.keys() == expected.keys()
    for parameter, value in expected.items():
        assert (found[parameter] - value).norm() <= 1e-5 * value.norm(), parameter


@interpreted
def test_re_emitting_units_run_one_product_again() -> None:
    """The down projection, because what its unit saves is known only when the whole unit has run."""
    found = again(MODES["pointwise"], build_ops(REEMIT, CPU, Workload(SMALL, 29, 1, 0, compiled=False)))
    assert {key: count for key, count in found.items() if key in (QKV, OUT, UP, ATTENTION)} == {OUT: 1}
    assert (found["rms_norm"], found["add_rms_norm"], found["swiglu"]) == (1, 1, 1)


def test_every_second_block_is_the_second_and_the_fourth() -> None:
    with torch.device("meta"):
        model = Llama(replace(LLAMA3, n_layers=5))
    apply(model, MODES["every second block"], Compile())
    assert ["forward" in vars(block) for block in model.blocks] == [False, True, False, True, False]


SHAPE, TOKENS = FLAVORS["llama3_8b"], 1024
# Bytes that a bfloat16 block keeps: its input, then in the model's order what the mode names; attention's statistics
# are 4 bytes per head and token.
STREAM, HEADS, FFN = (2 * TOKENS * width for width in (SHAPE.dim, 2 * SHAPE.n_heads, SHAPE.ffn_dim))
PACKED = 2 * TOKENS * SHAPE.qkv_dim
KEPT = {
    "full": STREAM,
    "op": STREAM + PACKED + STREAM + HEADS + FFN,
    "attention": STREAM + PACKED + STREAM + HEADS,
    "pointwise": STREAM + PACKED + STREAM + HEADS + STREAM + 2 * FFN,
}


@pytest.mark.parametrize("measure", [eager, compiled])
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name: str, measure: Any) -> None:
    cost = measure(SHAPE, MODES[name], TOKENS)
    assert cost.kept == pytest.approx(KEPT[name], rel=1e-3)
    assert cost.recomputed_attention == (name == "full")
    weights = {"qkv": SHAPE.qkv_dim, "out": SHAPE.dim, "up": SHAPE.ffn_dim}
    whole = SHAPE.dim * (SHAPE.qkv_dim + SHAPE.dim + 3 * SHAPE.ffn_dim)
    repeated = {"full": whole - SHAPE.dim * SHAPE.ffn_dim, "op": SHAPE.dim * (weights["out"] + weights["up"])}
    repeated["attention"] = SHAPE.dim * (weights["out"] + 2 * weights["up"])
    assert cost.recomputed_products == pytest.approx(repeated.get(name, 0) / whole, abs=1e-6)


def test_the_budget_moves_what_is_kept() -> None:
    kept = [compiled(SHAPE, ActivationCheckpoint("memory_budget", memory_budget=b), TOKENS).kept for b in (0.0, 0.5, 1)]
    assert kept[0] < kept[1] < kept[2]
    assert kept[2] == compiled(SHAPE, NONE, TOKENS).kept


def kept_by_compiled_blocks(mode: ActivationCheckpoint) -> int:
    """Bytes that a model's compiled blocks keep for their backward pass, in whatever graphs the compiler makes."""
    model = Llama(replace(SMALL, n_layers=1))
    compiles = Compile(enable=True, backend="aot_eager_decomp_partition", components=("blocks",))
    apply(model, mode, compiles)
    compile_model(model, compiles)
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        logits = model(torch.arange(32)[None] % SMALL.vocab_size)
    logits.sum().backward()
    return sum(kept.values())


def test_models_of_one_process_keep_what_their_own_modes_say() -> None:
    modes = {"none": NONE} | {name: MODES[name] for name in ("pointwise", "op", "full")}
    budgets = {f"budget {budget}": ActivationCheckpoint("memory_budget", memory_budget=budget) for budget in (0.5, 0.0)}
    alone = {}
    for name, mode in (modes | budgets).items():
        torch._dynamo.reset()
        alone[name] = kept_by_compiled_blocks(mode)
    for some in (modes, ["none", *budgets]):
        kept = [alone[name] for name in some]
        assert kept == sorted(set(kept), reverse=True)
    torch._dynamo.reset()
    assert {name: kept_by_compiled_blocks(mode) for name, mode in (modes | budgets | {"none": NONE}).items()} == alone


def test_a_budget_holds_in_a_run_whose_gradients_were_compared_first() -> None:
    """The comparison compiles the same code at the same sizes before, and keeps what the compiler keeps by itself."""
    budget = ActivationCheckpoint("memory_budget", memory_budget=0.0)
    torch._dynamo.reset()
    whole = kept_by_compiled_blocks(NONE)
    torch._dynamo.reset()
    compiles = Compile(enable=True, backend="aot_eager_decomp_partition")
    check_compiled_gradients(SMALL, REFERENCE, compiles, torch.float32, CPU, 1, 32)
    assert kept_by_compiled_blocks(budget) < whole


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("mode sometimes", "sometimes"),
        ("mode memory_budget --activation_checkpoint.memory_budget 1.5", "memory_budget is 1.5, not in [0, 1]"),
        ("mode memory_budget --activation_checkpoint.memory_budget -0.1", "memory_budget is -0.1, not in [0, 1]"),
        ("mode selective --activation_checkpoint.selective_ac_option third", "'third' is neither a positive integer"),
        ("mode selective --activation_checkpoint.selective_ac_option 0", "'0' is neither a positive integer"),
    ],
)
def test_bad_settings(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"--activation_checkpoint.{words}".split())
    assert sentence in str(caught.value)


def test_settings_that_would_do_nothing() -> None:
    budget = ActivationCheckpoint("memory_budget")
    with pytest.raises(ConfigError, match=r"compile\.enable is False"):
        activation_checkpoint.check(budget, Compile(), n_layers=2)
    with pytest.raises(ConfigError, match=r"compile\.components is norm loss"):
        activation_checkpoint.check(budget, Compile(True, ("norm", "loss")), n_layers=2)
    with pytest.raises(ConfigError, match=r"compile\.backend is 'eager'"):
        activation_checkpoint.check(budget, Compile(True, backend="eager"), n_layers=2)
    with pytest.raises(ConfigError, match=r"compile\.components has model"):
        activation_checkpoint.check(budget, Compile(True, ("model",)), n_layers=2)
    activation_checkpoint.check(budget, Compile(True, ("blocks",)), n_layers=2)
    with pytest.raises(ConfigError, match="3 is more than the model's 2 blocks"):
        activation_checkpoint.check(ActivationCheckpoint("selective", "3"), Compile(), n_layers=2)
    activation_checkpoint.check(ActivationCheckpoint("selective", "2"), Compile(), n_layers=2)
