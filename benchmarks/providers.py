"""The operators as each library offers them, and the functions that a case runs with them.

Every provider of a case is called with the same tensors and must return what the eager reference returns.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import titan_kernels
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from titan_kernels import reference
from torch import Tensor

from benchmarks.shapes import Case
from titan_fast.flavors import ModelShape
from titan_fast.model import Block, rope_tables
from titan_fast.ops import REFERENCE, Ops

EPS = 1e-5
REEMIT_BUDGET = 0.7  # the partitioner's activation memory budget at which Inductor recomputes the same activations

Function = Callable[..., tuple[Tensor, ...]]


class Unavailable(Exception):
    """This provider cannot be had here; the message says why."""


@dataclass(frozen=True)
class Operators:
    """One library's. None where it has no such operator. Signatures are those of titan_kernels.reference."""

    rms_norm: Callable[..., Any] | None = None
    add_rms_norm: Callable[..., Any] | None = None
    rope: Callable[..., Any] | None = None
    swiglu: Callable[..., Any] | None = None
    norm_linear: Callable[..., Any] | None = None
    swiglu_linear: Callable[..., Any] | None = None
    loss_and_grad: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """logits, labels -> (sum of losses, its gradient). May overwrite the logits."""
    overwrites: tuple[str, ...] = ()
    """Cases whose inputs it overwrites."""


@dataclass(frozen=True)
class Provider:
    """How a case is run: with whose operators, compiled or not."""

    name: str
    operators: Callable[[], Operators]
    compiled: bool = False
    only: tuple[str, ...] = ()
    """The operators that it has; empty for all."""


def _reference_norm_linear(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, matrices: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    if residual is None:
        y, new_residual = reference.rms_norm(x, weight, eps), x
    else:
        y, new_residual = reference.add_rms_norm(x, residual, weight, eps)
    return (*(F.linear(y, matrix) for matrix in matrices), new_residual)


def _differentiate(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def loss_and_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        total = loss(logits, labels)
        return total.detach(), torch.autograd.grad(total, logits)[0]

    return loss_and_grad


def _reference_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return reference.cross_entropy(logits, labels).sum()


def _reference() -> Operators:
    return Operators(
        rms_norm=reference.rms_norm,
        add_rms_norm=reference.add_rms_norm,
        rope=reference.rope,
        swiglu=reference.swiglu,
        norm_linear=_reference_norm_linear,
        swiglu_linear=lambda gate, up, matrix: F.linear(reference.swiglu(gate, up), matrix),
        loss_and_grad=_differentiate(_reference_loss),
    )


def _ours() -> Operators:
    def loss_and_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.ones((), device=logits.device)
        with torch.no_grad():
            return titan_kernels.cross_entropy_with_grad_(logits.detach(), labels, scale).sum(), logits.detach()

    return Operators(
        rms_norm=titan_kernels.rms_norm,
        add_rms_norm=titan_kernels.add_rms_norm,
        rope=titan_kernels.rope,
        swiglu=titan_kernels.swiglu,
        norm_linear=titan_kernels.norm_linear,
        swiglu_linear=titan_kernels.swiglu_linear,
        loss_and_grad=loss_and_grad,
        overwrites=("cross_entropy",),
    )


def _torch() -> Operators:
    return Operators(rms_norm=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))


def _need(package: str, installed_as: str) -> None:
    if not torch.cuda.is_available():
        raise Unavailable(f"{package} needs a GPU")
    if importlib.util.find_spec(installed_as) is None:
        raise Unavailable(f"{package} is not installed")


def _liger() -> Operators:
    _need("liger-kernel", "liger_kernel")
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.rope import LigerRopeFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    def rope(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        head_dim = 2 * cos.shape[1]
        group = n_heads // n_kv_heads
        heads = qkv.unflatten(2, (n_kv_heads, group + 2, head_dim))
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in heads.split((group, 1, 1), dim=3))
        tables = cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]
        return *LigerRopeFunction.apply(q, k, *tables), v

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "sum")[0]

    return Operators(
        # Gradients in place would overwrite what the benchmark gives as gradient, so not in place.
        rms_norm=lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False),
        add_rms_norm=lambda x, residual, weight, eps: LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps),
        rope=rope,
        swiglu=LigerSiLUMulFunction.apply,
        loss_and_grad=_differentiate(loss),
        overwrites=("swiglu", "cross_entropy"),
    )


def _quack() -> Operators:
    _need("quack-kernels", "quack")
    from quack.cross_entropy import cross_entropy  # pyright: ignore[reportMissingImports]
    from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, reduction="sum", inplace_backward=True)

    return Operators(
        rms_norm=lambda x, weight, eps: rmsnorm(x, weight, eps=eps),
        add_rms_norm=lambda x, residual, weight, eps: rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True),
        loss_and_grad=_differentiate(loss),
        overwrites=("cross_entropy",),
    )


EAGER = Provider("eager", _reference)
PROVIDERS = {
    "alone": (
        EAGER,
        Provider("compiled", _reference, compiled=True),
        Provider("ours", _ours),
        Provider("torch", _torch, only=("rms_norm",)),
        Provider("liger", _liger, only=("rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy")),
        Provider("quack", _quack, only=("rms_norm", "add_rms_norm", "cross_entropy")),
    ),
    "block": (
        EAGER,
        Provider("ours", _ours),
        Provider("compiled", _reference, compiled=True),
        Provider("ours_compiled", _ours, compiled=True),
    ),
}


def providers(case: Case) -> tuple[Provider, ...]:
    """Who is asked to run `case`. The loss is no part of a compiled block; there torch's own chunked loss competes."""
    if case.op == "cross_entropy" and case.context == "block":
        fused = Provider("torch", _torch)
        return (EAGER, Provider("compiled", _reference, compiled=True), Provider("ours", _ours), fused)
    if case.op.startswith("block"):
        return tuple(provider for provider in PROVIDERS["block"] if provider.compiled)
    return tuple(p for p in PROVIDERS[case.context] if not p.only or case.op in p.only)


def build(case: Case, provider: Provider, backend: str) -> Function:
    """The function of `make_inputs(case)`'s tensors.

    Raises:
        Unavailable: the library is not there.
    """
    operators = provider.operators()
    if case.op == "cross_entropy":
        return _loss_function(case, provider, operators, backend)
    function = _block_function(case, operators) if case.op.startswith("block") else _piece(case, operators)
    if not provider.compiled:
        return function
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    if case.op == "reemit" and provider.name == "compiled":
        return _with_memory_budget(compiled)
    return compiled


def _with_memory_budget(compiled: Function) -> Function:
    """The setting matters when the first call compiles."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        with functorch_config.patch(activation_memory_budget=REEMIT_BUDGET):
            return compiled(*inputs)

    return call


def _required(operators: Operators, name: str) -> Callable[..., Any]:
    operator = getattr(operators, name)
    assert operator is not None, f"a provider that has no {name} was asked for it"
    return operator


def _piece(case: Case, operators: Operators) -> Function:
    if case.op == "reemit":
        return _feed_forward_half(operators)
    operator = _required(operators, case.op)
    heads = case.model.n_heads, case.model.n_kv_heads
    alone: dict[str, Function] = {
        "rms_norm": lambda x, weight: (operator(x, weight, EPS),),
        "add_rms_norm": lambda x, residual, weight: operator(x, residual, weight, EPS),
        "rope": lambda qkv, cos, sin: operator(qkv, cos, sin, *heads),
        "swiglu": lambda gate, up: (operator(gate, up),),
    }
    if case.context == "alone":
        return alone[case.op]

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
        y, new_residual = operator(F.linear(x, before), residual, weight, EPS)
        return F.linear(y, after), new_residual

    def rope(x: Tensor, cos: Tensor, sin: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        q, k, v = operator(F.linear(x, before), cos, sin, *heads)
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads[0] != heads[1]),)

    def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        return (F.linear(operator(F.linear(x, gate), F.linear(x, up)), down),)

    def rms_norm(x: Tensor, weight: Tensor, after: Tensor) -> tuple[Tensor, ...]:
        return F.linear(operator(x, weight, EPS), after), x  # x is also the residual stream

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "rope": rope, "swiglu": swiglu}[case.op]


def _feed_forward_half(operators: Operators) -> Function:
    norm_linear, swiglu_linear = _required(operators, "norm_linear"), _required(operators, "swiglu_linear")

    def half(x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        gated, lifted, new_residual = norm_linear(x, residual, weight, EPS, (gate, up))
        return (new_residual + swiglu_linear(gated, lifted, down),)

    return half


def _block_function(case: Case, operators: Operators) -> Function:
    """A whole decoder block of titan_fast.model, its parameters passed in."""
    names = ("rms_norm", "add_rms_norm", "rope", "swiglu")
    ops: Ops = replace(
        REFERENCE,
        carry_residual=case.op == "block_carried",
        **{name: _required(operators, name) for name in names},
    )
    with torch.device("meta"):
        block = Block(model_shape(case), ops)
    parameter_names = [name for name, _ in block.named_parameters()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(parameter_names, inputs, strict=False))
        cos, sin, x, *residual = inputs[len(parameter_names) :]
        arguments = (x, residual[0] if residual else None, (cos, sin))
        outputs = torch.func.functional_call(block, parameters, arguments)
        return tuple(output for output in outputs if output is not None)

    return run


def _loss_function(case: Case, provider: Provider, operators: Operators, backend: str) -> Function:
    if case.context == "block" and provider.name == "torch":
        return _torch_linear_cross_entropy()
    if provider.compiled:
        compiled = torch.compile(_reference_loss, fullgraph=True, dynamic=False, backend=backend)
        loss_and_grad = _differentiate(compiled)
    else:
        loss_and_grad = _required(operators, "loss_and_grad")
    if case.context == "alone":
        return loss_and_grad

    def head(x: Tensor, labels: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        logits = F.linear(x.detach(), matrix.detach()).requires_grad_()
        loss, dlogits = loss_and_grad(logits, labels)
        return loss, dlogits @ matrix.detach(), dlogits.t() @ x.detach()

    return head


def _torch_linear_cross_entropy() -> Function:
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")

    def head(x: Tensor, labels: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        loss = fused(x, matrix, labels, reduction="sum")
        return loss.detach(), *torch.autograd.grad(loss, (x, matrix))

    return head


def model_shape(case: Case) -> ModelShape:
    model = case.model
    sizes = (model.width, 1, model.n_heads, model.n_kv_heads, model.ffn_width, model.vocab)
    return ModelShape(*sizes, max_seq_len=case.seq_len)


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of the case's functions: bfloat16, normal with the variance of a freshly initialised model's, those
    that are differentiated requiring gradients. Never zeros: the power a GPU draws depends on the data."""
    generator = torch.Generator(device).manual_seed(20)

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * deviation
        return values.to(torch.bfloat16).requires_grad_()

    def matrix(out: int, width: int) -> Tensor:
        return normal(out, width, deviation=width**-0.5)

    model, rows = case.model, case.rows
    batch, seq_len = case.tokens // case.seq_len, case.seq_len
    # A shard has fewer heads than its width would hold; the tables depend on the head's dimension alone.
    heads = replace(model_shape(case), dim=model.n_heads * model.head_dim)
    cos, sin = rope_tables(heads, seq_len, device)
    packed = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    if case.op.startswith("block"):
        with torch.device("meta"):
            parameters = list(Block(model_shape(case), REFERENCE).parameters())
        weights = [matrix(*p.shape) if p.dim() == 2 else normal(*p.shape) for p in parameters]
        streams = [normal(batch, seq_len, model.width) for _ in range(2 if case.op == "block_carried" else 1)]
        return (*weights, cos, sin, *streams)
    if case.op == "cross_entropy":
        labels = torch.randint(0, model.vocab, (rows,), generator=generator, device=device)
        if case.context == "alone":
            return normal(rows, model.vocab), labels
        return normal(rows, model.width), labels, matrix(model.vocab, model.width)
    if case.op == "rope":
        if case.context == "alone":
            return normal(batch, seq_len, packed), cos, sin
        return normal(batch, seq_len, model.width), cos, sin, matrix(packed, model.width)
    if case.op == "swiglu" and case.context == "alone":
        return normal(rows, model.ffn_width), normal(rows, model.ffn_width)
    x = normal(rows, model.width)
    up, down = (model.ffn_width, model.width), (model.width, model.ffn_width)
    if case.op == "swiglu":
        return x, matrix(*up), matrix(*up), matrix(*down)
    if case.op == "reemit":
        return x, normal(rows, model.width), normal(model.width), matrix(*up), matrix(*up), matrix(*down)
    if case.op == "rms_norm":
        return (x, normal(model.width)) + ((matrix(packed, model.width),) if case.context == "block" else ())
    tail = (matrix(model.width, model.width), matrix(*up)) if case.context == "block" else ()
    return x, normal(rows, model.width), normal(model.width), *tail
