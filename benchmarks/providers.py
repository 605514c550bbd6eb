"""Each library's operators, and the functions that a case runs with them.

All providers of a case are called with the same tensors, and must return what the eager reference returns.
"""

import functools
import importlib.metadata
import importlib.util
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import titan_kernels
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from titan_kernels import reference
from torch import Tensor

from benchmarks.contests import EAGER_PARTS
from benchmarks.shapes import LOSS_CHUNK, Case
from titan_fast import compilation
from titan_fast.config import Compile, Kernels
from titan_fast.flavors import ModelShape
from titan_fast.loss import LinearCrossEntropy, has_torch_loss, torch_linear_cross_entropy
from titan_fast.model import Block, rope_tables
from titan_fast.ops import REFERENCE, Ops, Workload, build_ops

EPS = 1e-5
REEMIT_BUDGET = 0.7  # the partitioner's activation memory budget at which Inductor recomputes the same activations

PACKAGES = {"liger": "liger-kernel", "quack": "quack-kernels"}
"""Of providers that are libraries."""

Function = Callable[..., tuple[Tensor, ...]]


class Unavailable(Exception):
    """This provider is not available; the message says why."""


@dataclass(frozen=True)
class Operators:
    """One library's operators; None for those that it lacks. Signatures are those of titan_kernels.reference."""

    rms_norm: Callable[..., Any] | None = None
    add_rms_norm: Callable[..., Any] | None = None
    rope: Callable[..., Any] | None = None
    swiglu: Callable[..., Any] | None = None
    norm_linear: Callable[..., Any] | None = None
    swiglu_linear: Callable[..., Any] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    """logits, labels -> sum of losses. For peers, which use autograd; our losses come with their gradient."""


@dataclass(frozen=True)
class Provider:
    """How a case is run: with whose operators, compiled or not."""

    name: str
    operators: Callable[[], Operators] | None = None
    """A library's. Not used in blocks and for our losses, where `kernels` decides what runs."""
    compiled: bool = False
    only: tuple[str, ...] = ()
    """The operators that it has; empty: all."""
    kernels: tuple[str, ...] = ()
    """Which of titan_fast's switches are on triton; the others are on reference."""
    is_auto: bool = False
    """All of titan_fast's switches on auto instead."""
    budget: float = 1.0
    """The partitioner's activation memory budget."""
    is_peer: bool = False
    """Another project's library: if it cannot run, this project has not failed."""

    @property
    def version(self) -> str:
        """A library's own version; "" for what torch and this project are."""
        package = PACKAGES.get(self.name)
        try:
            return importlib.metadata.version(package) if package else ""
        except importlib.metadata.PackageNotFoundError:
            return ""


def _reference() -> Operators:
    return Operators(
        rms_norm=reference.rms_norm,
        add_rms_norm=reference.add_rms_norm,
        rope=reference.rope,
        swiglu=reference.swiglu,
        norm_linear=reference.norm_linear,
        swiglu_linear=reference.swiglu_linear,
    )


def _ours() -> Operators:
    return Operators(
        rms_norm=titan_kernels.rms_norm,
        add_rms_norm=titan_kernels.add_rms_norm,
        rope=titan_kernels.rope,
        swiglu=titan_kernels.swiglu,
        norm_linear=titan_kernels.norm_linear,
        swiglu_linear=titan_kernels.swiglu_linear,
    )


def _torch() -> Operators:
    return Operators(rms_norm=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))


def _need(package: str, installed_as: str) -> None:
    if not torch.cuda.is_available():
        raise Unavailable(f"{package} needs a GPU")
    if importlib.util.find_spec(installed_as) is None:
        raise Unavailable(f"{package} is not installed")


def _liger() -> Operators:
    """For liger-kernel 0.8.5. Its cross entropy counts the labels with .item() and compares the incoming gradient on
    the host, so the GPU runs dry in every call, and its times are marked as not queued."""
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
        # Not in place, which would overwrite the gradient that the benchmark passes.
        rms_norm=lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False),
        add_rms_norm=lambda x, residual, weight, eps: LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps),
        rope=rope,
        swiglu=LigerSiLUMulFunction.apply,
        loss=loss,
    )


def _quack() -> Operators:
    """For quack-kernels 0.6.5."""
    _need("quack-kernels", "quack")
    from quack.cross_entropy import cross_entropy  # pyright: ignore[reportMissingImports]
    from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]

    return Operators(
        rms_norm=lambda x, weight, eps: rmsnorm(x, weight, eps=eps),
        add_rms_norm=lambda x, residual, weight, eps: rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True),
        loss=lambda logits, labels: cross_entropy(logits, labels, reduction="sum", inplace_backward=True),
    )


NORMS = ("rms_norm", "add_rms_norm")
PARTS = ("rms_norm", "rope", "swiglu")  # switches that can be on together; the units replace the first and last
EAGER = Provider("eager", _reference)
COMPILED = Provider("compiled", _reference, compiled=True)
OURS = Provider("ours", _ours, kernels=("cross_entropy",))
LIBRARIES = (
    EAGER,
    COMPILED,
    OURS,
    Provider("torch", _torch, only=("rms_norm",), is_peer=True),
    Provider("liger", _liger, only=(*NORMS, "rope", "swiglu", "cross_entropy"), is_peer=True),
    Provider("quack", _quack, only=(*NORMS, "cross_entropy"), is_peer=True),
)
HEADS = (EAGER, COMPILED, OURS, Provider("torch", is_peer=True))
OURS_COMPILED = Provider("ours_compiled", _ours, compiled=True, kernels=PARTS)
AUTO = Provider("auto", compiled=True, is_auto=True)
EAGER_BLOCKS = (
    EAGER,
    Provider("ours", kernels=PARTS),
    Provider(EAGER_PARTS, kernels=("rms_norm", "swiglu")),
    Provider("eager+reemit", kernels=("reemit",)),
)
EXCHANGED = {name: Provider(f"compiled+{name}", compiled=True, kernels=(name,)) for name in (*PARTS, "reemit")}


def providers(case: Case) -> tuple[Provider, ...]:
    """The providers that run `case`."""
    if case.op == "head":
        return HEADS
    if not case.op.startswith("block"):
        found = tuple(p for p in LIBRARIES if not p.only or case.op in p.only)
        return (*found, OURS_COMPILED) if case.op in NORMS and case.tensor_parallel > 1 else found
    if case.tensor_parallel > 1:  # where norms are judged alone, and there are no units
        return COMPILED, EXCHANGED["rope"], EXCHANGED["swiglu"]
    if case.op == "block_carried":
        return COMPILED, EXCHANGED["rms_norm"], EXCHANGED["reemit"], OURS_COMPILED, AUTO
    budget = Provider(f"compiled_budget_{REEMIT_BUDGET}", compiled=True, budget=REEMIT_BUDGET)
    return *EAGER_BLOCKS, COMPILED, *EXCHANGED.values(), OURS_COMPILED, budget, AUTO


def build(case: Case, provider: Provider, backend: str, device: torch.device) -> Function:
    """A function of `make_inputs(case, device)`'s tensors.

    Raises:
        Unavailable: the library is missing.
    """
    if case.op == "head":
        return _head(provider, backend)
    if case.op.startswith("cross_entropy"):
        return _loss(case, provider, backend)
    function = _block(case, provider, device) if case.op.startswith("block") else _alone(case, provider)
    if not provider.compiled:
        return function
    compiled = _compiler(backend)(_with_own_code(function))
    return compiled if provider.budget == 1.0 else _with_memory_budget(compiled, provider.budget)


def _with_own_code(function: Any) -> Any:
    """A copy of the function with its own code object. Dynamo keeps compiled code by code object, and would use another
    provider's if its guards hold; the memory budget is not among them."""
    code = function.__code__.replace()
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def _compiler(backend: str) -> Callable[[Any], Any]:
    """What compiles as a run does."""
    return compilation.compiler(Compile(enable=True, backend=backend))


def _with_memory_budget(compiled: Function, budget: float) -> Function:
    """Sets the budget around calls; it matters in the first, which compiles."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        with functorch_config.patch(activation_memory_budget=budget):
            return compiled(*inputs)

    return call


def _alone(case: Case, provider: Provider) -> Function:
    assert provider.operators is not None
    operator = getattr(provider.operators(), case.op)
    assert operator is not None, f"{provider.name} has no {case.op} and was asked for it"
    heads = case.model.n_heads, case.model.n_kv_heads
    functions: dict[str, Function] = {
        "rms_norm": lambda x, weight: (operator(x, weight, EPS),),
        "add_rms_norm": lambda x, residual, weight: operator(x, residual, weight, EPS),
        "rope": lambda qkv, cos, sin: operator(qkv, cos, sin, *heads),
        "swiglu": lambda gate, up: (operator(gate, up),),
        "norm_linear": lambda x, residual, weight, matrix: operator(x, residual, weight, EPS, (matrix,)),
        "swiglu_linear": lambda gate, up, matrix: (operator(gate, up, matrix),),
    }
    return functions[case.op]


def _kernels(provider: Provider, carried: bool) -> Kernels:
    if provider.is_auto:
        return Kernels(carry_residual=carried)
    switches: dict[str, Any] = dict.fromkeys(("rms_norm", "rope", "swiglu", "cross_entropy", "reemit"), "reference")
    return Kernels(**{**switches, **dict.fromkeys(provider.kernels, "triton")}, carry_residual=carried)


def block_ops(case: Case, provider: Provider, device: torch.device) -> Ops:
    """The operators that a run on this device would choose, including attention.

    Raises:
        Unavailable: auto chooses no kernel here, so it is the reference.
    """
    shape = model_shape(case)
    workload = Workload(shape, case.tokens, case.tensor_parallel, LOSS_CHUNK, compiled=provider.compiled)
    ops = build_ops(_kernels(provider, case.op == "block_carried"), device, workload)
    choices = [choice for name, choice, _ in ops.reasons if name not in ("attention", "residual")]
    if provider.is_auto and set(choices) == {"reference"}:
        raise Unavailable("auto is the reference of every operator here: compiled is its time")
    return ops


def _block(case: Case, provider: Provider, device: torch.device) -> Function:
    """A whole decoder block of titan_fast.model, a function of its parameters too; with tensor parallelism one rank's
    part of it, over all tokens and without communication."""
    with torch.device("meta"):
        block = Block(model_shape(case), block_ops(case, provider, device))
    names = [name for name, _ in block.named_parameters()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, inputs, strict=False))
        cos, sin, x, *residual = inputs[len(names) :]
        arguments = (x, residual[0] if residual else None, (cos, sin))
        outputs = torch.func.functional_call(block, parameters, arguments)
        return tuple(output for output in outputs if output is not None)

    return run


def loss_ops(provider: Provider, backend: str) -> Ops:
    """The cross entropies that a run would have: the reference's, compiled as by `[compile]` or not, or ours."""
    if provider.compiled:
        return compilation.compiled_cross_entropy(REFERENCE, _compiler(backend))
    if not provider.kernels:
        return REFERENCE
    return replace(
        REFERENCE,
        cross_entropy_with_grad_=titan_kernels.cross_entropy_with_grad_,
        cross_entropy_stats=titan_kernels.cross_entropy_stats,
        cross_entropy_grad_=titan_kernels.cross_entropy_grad_,
    )


def _loss(case: Case, provider: Provider, backend: str) -> Function:
    """logits, labels, scale -> the sum of losses, and the gradient, which overwrites the logits."""
    if provider.is_peer:
        assert provider.operators is not None
        loss = provider.operators().loss
        assert loss is not None
        return functools.partial(_differentiate, loss)
    ops = loss_ops(provider, backend)

    @torch.no_grad()
    def whole(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return ops.cross_entropy_with_grad_(logits, labels, scale, -100, 0.0).sum(), logits

    offset = case.model.vocab * (case.tensor_parallel // 2)

    @torch.no_grad()
    def sharded(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """What a rank does before and after ranks exchange their statistics, with its own instead of everybody's."""
        peak, total, target = ops.cross_entropy_stats(logits, labels, offset)
        logsumexp = peak + torch.log(total)
        ops.cross_entropy_grad_(logits, labels, offset, logsumexp, scale, -100, 0.0)
        return (logsumexp - target).sum(), logits

    return sharded if case.op == "cross_entropy_sharded" else whole


def _differentiate(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, scale: Tensor
) -> tuple[Tensor, ...]:
    logits = logits.detach().requires_grad_()
    total = loss(logits, labels)
    return total.detach(), torch.autograd.grad(total, logits)[0]  # scale is 1


def _head(provider: Provider, backend: str) -> Function:
    """The head's matrix products and the loss, a chunk at a time, as in titan_fast.loss."""
    if provider.is_peer:
        if not has_torch_loss():
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        loss: Callable[..., Tensor] = torch_linear_cross_entropy
    else:
        loss = LinearCrossEntropy(loss_ops(provider, backend), LOSS_CHUNK)

    def head(x: Tensor, matrix: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        total = loss(x, matrix, labels, scale)
        return total.detach(), *torch.autograd.grad(total, (x, matrix))

    return head


def model_shape(case: Case) -> ModelShape:
    """One block of the unsharded model; a rank's part is determined by its parameters."""
    model = case.whole
    sizes = (model.width, 1, model.n_heads, model.n_kv_heads, model.ffn_width, model.vocab)
    return ModelShape(*sizes, max_seq_len=case.seq_len)


def parameter_sizes(case: Case) -> list[tuple[int, ...]]:
    """The sizes of one rank's part of a block's parameters, in their order."""
    with torch.device("meta"):
        named = dict(Block(model_shape(case), REFERENCE).named_parameters())
    degree = case.tensor_parallel
    cut = {"qkv": (degree, 1), "gate": (degree, 1), "up": (degree, 1), "out": (1, degree), "down": (1, degree)}
    sizes = []
    for name, parameter in named.items():
        divisors = cut.get(name.split(".")[-2], (1,))
        sizes.append(tuple(size // divisor for size, divisor in zip(parameter.shape, divisors, strict=True)))
    return sizes


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of the case's functions: bfloat16, normal, with the variances in a freshly initialised model. Those
    that are differentiated require gradients. Never zeros, because the power that a GPU draws depends on the data."""
    generator = torch.Generator(device).manual_seed(20)

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * deviation
        return values.to(torch.bfloat16).requires_grad_()

    def matrix(out: int, width: int) -> Tensor:
        return normal(out, width, deviation=width**-0.5)

    model, rows = case.model, case.rows
    batch, seq_len = case.tokens // case.seq_len, case.seq_len
    cos, sin = rope_tables(model_shape(case), seq_len, device)
    if case.op.startswith("block"):
        weights = [matrix(*size) if len(size) == 2 else normal(*size) for size in parameter_sizes(case)]
        streams = [normal(batch, seq_len, model.width) for _ in range(2 if case.op == "block_carried" else 1)]
        return (*weights, cos, sin, *streams)
    scale = torch.ones((), device=device)
    labels = torch.randint(0, case.whole.vocab, (rows,), generator=generator, device=device)
    if case.op == "head":
        return normal(rows, model.width), matrix(model.vocab, model.width), labels, scale
    if case.op.startswith("cross_entropy"):
        return normal(rows, model.vocab).detach(), labels, scale
    if case.op == "rope":
        return normal(batch, seq_len, (model.n_heads + 2 * model.n_kv_heads) * model.head_dim), cos, sin
    if case.op.startswith("swiglu"):
        down = (matrix(model.width, model.ffn_width),) if case.op == "swiglu_linear" else ()
        return normal(rows, model.ffn_width), normal(rows, model.ffn_width), *down
    if case.op == "rms_norm":
        return normal(rows, model.width), normal(model.width)
    after = (matrix(model.ffn_width, model.width),) if case.op == "norm_linear" else ()
    return normal(rows, model.width), normal(rows, model.width), normal(model.width), *after
