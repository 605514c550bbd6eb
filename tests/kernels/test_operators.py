"""The operators within torch: opcheck, gradcheck, the compiler, checkpoint policies, FLOPs, launches."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

pytest.importorskip("triton", reason="triton is not installed")

import titan_kernels
from titan_kernels.cross_entropy import launches as cross_entropy_launches
from titan_kernels.launch import Launch
from titan_kernels.rms_norm import launches as rms_norm_launches
from titan_kernels.rope import launches as rope_launches
from titan_kernels.swiglu import launches as swiglu_launches
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from tests.kernels.operators import OPERATORS, Operator, with_gaps

ROOT = Path(__file__).parents[2]
OPS = torch.ops.titan_kernels
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def leaves(operator: Operator, rows: int, device: torch.device) -> list[Tensor]:
    return [x.to(device).requires_grad_() for x in operator.inputs(rows)]


def total(outputs: Any) -> Tensor:
    """A scalar whose gradient differs from element to element."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([(output.sin() * output).sum() for output in outputs]).sum()


def raw_calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of every registered operator; differentiable ones have leaves that require gradients."""
    x, s, gate = (torch.randn(3, 2, 32, device=device) for _ in range(3))
    weight, scale = torch.randn(32, device=device), torch.rand(3, 2, device=device)
    grad = [t.clone().requires_grad_() for t in (x, s, weight)]
    qkv = torch.randn(3, 5, 64, device=device, requires_grad=True)
    cos, sin = torch.randn(5, 4, device=device), torch.randn(5, 4, device=device)
    dq, dk, dv = (torch.randn(3, heads, 5, 8, device=device) for heads in (4, 2, 2))
    logits, labels = torch.randn(4, 48, device=device), torch.tensor([0, 3, -100, 47], device=device)
    row, one = torch.rand(4, device=device), torch.tensor(0.5, device=device)
    return {
        "rms_norm": (grad[0], grad[2], 1e-5),
        "add_rms_norm": (*grad, 1e-5),
        "rms_norm_backward": (x, None, s, weight, scale),
        "rms_norm_backward_emit": (x, None, gate, s, weight, scale),
        "rms_norm_backward_emit, of two": (x, s.cos(), None, s, weight, scale),
        "swiglu": (grad[0], grad[1]),
        "swiglu_backward": (x, s, gate),
        "swiglu_backward_emit": (x, s, gate),
        "rope": (qkv, cos, sin, 2),
        "rope_backward": (dq, dk.transpose(1, 2).contiguous().transpose(1, 2), dv, cos, sin),
        "cross_entropy": (logits.clone().requires_grad_(), labels, -100, 1e-2),
        "cross_entropy_backward": (row, logits, labels, row, row, -100, 1e-2),
        "cross_entropy_with_grad_": (logits, labels, one, -100, 1e-2),
        "cross_entropy_stats": (logits, labels, 7),
        "cross_entropy_grad_": (logits, labels, 7, row, one, -100, 1e-2),
    }


def test_every_registered_operator_is_checked(device: torch.device) -> None:
    registered = {name for name in dir(OPS) if isinstance(getattr(OPS, name), torch._ops.OpOverloadPacket)}
    assert registered <= set(raw_calls(device))


@pytest.mark.parametrize("name", sorted(raw_calls(torch.device("cpu"))))
def test_opcheck(name: str, device: torch.device) -> None:
    torch.library.opcheck(getattr(OPS, name.partition(",")[0]).default, raw_calls(device)[name])


@pytest.mark.parametrize("name", sorted(raw_calls(torch.device("cpu"))))
def test_opcheck_of_rows_with_gaps(name: str, device: torch.device) -> None:
    arguments = tree_map_only(Tensor, with_gaps, raw_calls(device)[name])
    assert any(isinstance(x, Tensor) and not x.is_contiguous() for x in arguments)
    torch.library.opcheck(getattr(OPS, name.partition(",")[0]).default, arguments)


@each_operator
def test_gradients_of_any_inputs(operator: Operator, device: torch.device) -> None:
    """For every subset that wants one: the same gradient as where all do, and none elsewhere."""
    inputs = [x.detach() for x in leaves(operator, 3, device)]

    def gradients(wanted: tuple[bool, ...]) -> list[Tensor | None]:
        given = [x.clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        total(operator.ours(*given)).backward()
        return [x.grad for x in given]

    everything = gradients((True,) * len(inputs))
    for wanted in product((False, True), repeat=len(inputs)):
        if not any(wanted):
            continue
        for found, whole, want in zip(gradients(wanted), everything, wanted, strict=True):
            if want:
                torch.testing.assert_close(found, whole)
            else:
                assert found is None


@each_operator
def test_where_nothing_is_recorded_nothing_is_kept(operator: Operator, device: torch.device) -> None:
    inputs = leaves(operator, 3, device)
    recorded = tree_leaves(operator.ours(*inputs))
    with torch.no_grad():
        unrecorded = tree_leaves(operator.ours(*inputs))
    for one, other in zip(recorded, unrecorded, strict=True):
        assert one.requires_grad and not other.requires_grad and other.grad_fn is None
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name", ["rms_norm", "add_rms_norm", "rope", "swiglu", "cross_entropy", "norm_linear", "swiglu_linear"]
)
def test_shapes_are_known_without_memory(name: str, device: torch.device) -> None:
    (operator,) = [one for one in OPERATORS if one.name == name]
    inputs = leaves(operator, 2, device)
    real, meta = (operator.ours(*given) for given in (inputs, [x.detach().to("meta") for x in inputs]))
    for one, other in zip(tree_leaves(real), tree_leaves(meta), strict=True):
        assert other.is_meta and (other.shape, other.dtype) == (one.shape, one.dtype)


@each_operator
# The kernels do not support float64, which gradcheck prefers, so steps and tolerances are for float32.
@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck(operator: Operator, device: torch.device) -> None:
    inputs = [x.detach().requires_grad_() for x in leaves(operator, 1, device)]
    assert torch.autograd.gradcheck(operator.ours, inputs, eps=1e-2, atol=1e-2, rtol=1e-2, fast_mode=True)


@each_operator
def test_no_second_derivative(operator: Operator, device: torch.device) -> None:
    inputs = leaves(operator, 2, device)
    (first,) = torch.autograd.grad(total(operator.ours(*inputs)), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|backward"):
        first.sum().backward()


@each_operator
def test_forward_mode_is_refused(operator: Operator, device: torch.device) -> None:
    """By us, or if a matrix product is part of it, by torch."""
    inputs = tuple(x.detach() for x in leaves(operator, 2, device))
    tangents = tuple(torch.ones_like(x) for x in inputs)
    for ours in (operator.ours, lambda *x: torch.func.vmap(operator.ours)(*(one[None] for one in x))):
        with pytest.raises(RuntimeError, match=r"reverse mode alone|setup_context"):
            torch.func.jvp(ours, inputs, tangents)


def test_forward_mode_of_what_takes_no_part_in_autograd_is_refused(device: torch.device) -> None:
    logits, labels = torch.randn(4, 48, device=device), torch.tensor([0, 3, -100, 47], device=device)
    one = torch.tensor(0.5, device=device)
    for ours in (
        lambda x: titan_kernels.cross_entropy_stats(x, labels)[0],
        lambda x: titan_kernels.cross_entropy_with_grad_(x, labels, one),
        lambda x: titan_kernels.cross_entropy_grad_(x, labels, 0, x[:, 0], one),
    ):
        with pytest.raises(NotImplementedError, match="reverse mode alone"):
            torch.func.jvp(ours, (logits,), (logits,))
        with pytest.raises(NotImplementedError, match="reverse mode alone"):
            torch.func.linearize(ours, logits)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse mode alone"):
            ours(forward_ad.make_dual(logits, logits))
    with forward_ad.dual_level():
        titan_kernels.cross_entropy_stats(logits, labels)  # which has no tangent


class Watched(Tensor):
    """A tensor that wraps another, and adds the names of its operators to `seen`."""

    seen: ClassVar[list[str]] = []
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Watched":
        layout = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        watched = Tensor._make_wrapper_subclass(cls, inner.shape, **layout)  # type: ignore[attr-defined]
        watched.inner = inner
        return watched

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        cls.seen.append(function.name())
        bare = tree_map_only(Watched, lambda watched: watched.inner, (arguments, options or {}))
        return tree_map_only(Tensor, Watched, function(*bare[0], **bare[1]))


@each_operator
def test_a_subclass_of_tensor_sees_the_operators(operator: Operator, device: torch.device) -> None:
    """As DTensor must, forward and backward: the wrapped tensor is not used directly."""
    plain = leaves(operator, 3, device)
    watched = [Watched(x.detach()).requires_grad_() for x in plain]
    expected = torch.autograd.grad(total(operator.ours(*plain)), plain)
    Watched.seen.clear()
    loss = total(operator.ours(*watched))
    forward = {name for name in Watched.seen if name.startswith("titan_kernels::")}
    Watched.seen.clear()
    gradients = torch.autograd.grad(loss, watched)
    backward = {name for name in Watched.seen if name.startswith("titan_kernels::")}
    assert forward and backward and not forward & backward
    for ours, theirs in zip(gradients, expected, strict=True):
        assert isinstance(ours, Watched) and torch.equal(ours.inner, theirs)


@each_operator
def test_compiled_without_graph_breaks(operator: Operator, device: torch.device) -> None:
    inputs = leaves(operator, 3, device)
    compiled = torch.compile(operator.ours, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(total(compiled(*inputs)), inputs)
    expected = torch.autograd.grad(total(operator.ours(*inputs)), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compiled_by_inductor(device: torch.device) -> None:
    """The operators one after another, as in a decoder block, through the whole compiler."""

    def block(x: Tensor, residual: Tensor, weight: Tensor, a: Tensor, b: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        y, residual = titan_kernels.add_rms_norm(x, residual, weight, 1e-5)
        cos = torch.linspace(0, 1, y.shape[1] * 4, device=y.device).view(-1, 4)
        q, k, v = titan_kernels.rope(torch.tanh(y) * 2, cos, 1 - cos, 2, 1)
        attention = (q + k + v).transpose(1, 2).flatten(2)
        gate, up, residual = titan_kernels.norm_linear(attention, residual[..., :16], weight[:16], 1e-5, (a, b))
        return titan_kernels.swiglu_linear(gate, up, down), residual

    shapes = [(2, 3, 32), (2, 3, 32), (32,), (24, 16), (24, 16), (16, 24)]
    inputs = [(torch.randn(shape, device=device) / 4).requires_grad_() for shape in shapes]
    outputs = torch.compile(block, fullgraph=True)(*inputs)
    expected_outputs = block(*inputs)
    torch.testing.assert_close(outputs, expected_outputs)
    found, expected = (torch.autograd.grad(total(o), inputs) for o in (outputs, expected_outputs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@each_operator
def test_new_row_counts_do_not_recompile(operator: Operator, device: torch.device) -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operator.ours, fullgraph=True, backend=graphs)
    for rows in (4, 6, 9, 16):
        inputs = leaves(operator, rows, device)
        torch.autograd.grad(total(compiled(*inputs)), inputs)
    assert graphs.frame_count <= 2  # once for 4 rows, once for any number


class Recorder:
    """Replaces `Launch._run`: runs, and records what ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Launch, tuple[Any, ...]]] = []
        run = Launch._run

        def record(launch: Launch, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
            self.calls.append((launch, arguments))
            run(launch, device, grid, arguments)

        monkeypatch.setattr(Launch, "_run", record)

    def counts(self) -> Counter[str]:
        return Counter(launch.name for launch, _ in self.calls)


def triton_type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
        return "*" + names[argument.dtype]
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_runs_is_what_launches_lists(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is compiled ahead of time is what a training run launches."""
    recorder = Recorder(monkeypatch)
    for operator in OPERATORS:
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves(operator, 16, device)]
        torch.autograd.grad(total(operator.ours(*inputs)), inputs)
    shapes = ((16, 32), (16, 32), (32,), (8, 32), (8, 32))
    x, residual, weight, *matrices = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    for given, n_matrices in ((None, 1), (None, 2), (residual, 1)):
        used = [matrix.requires_grad_() for matrix in matrices[:n_matrices]]
        total(titan_kernels.norm_linear(x.requires_grad_(), given, weight, 1e-5, tuple(used))).backward()
    logits, labels, one = torch.randn(4, 48, dtype=dtype, device=device), torch.arange(4, device=device), torch.ones(())
    titan_kernels.cross_entropy_with_grad_(logits, labels, one.to(device), ignore_index=2, z_loss=1e-2)
    _, logsumexp, _ = titan_kernels.cross_entropy_stats(logits, labels, 16)
    titan_kernels.cross_entropy_grad_(logits, labels, 16, logsumexp, one.to(device), ignore_index=2, z_loss=1e-2)
    listed = [
        *rms_norm_launches(32, dtype),
        *rope_launches(4, 2, 8, dtype),
        *swiglu_launches(dtype),
        *cross_entropy_launches(48, dtype, ignore_index=2, z_loss=1e-2),
    ]
    assert set(recorder.counts()) == {launch.name for launch in listed}
    for launch, arguments in recorder.calls:
        assert launch in listed
        parameters = [name for name in launch.kernel.arg_names if name not in launch.constexprs]
        assert list(launch.signature) == parameters == launch.kernel.arg_names[: len(parameters)]
        is_pointer = [kind.startswith("*") for kind in launch.signature.values()]
        assert is_pointer == sorted(is_pointer, reverse=True), "a launch takes the first so many for addresses"
        assert [triton_type(argument) for argument in arguments] == list(launch.signature.values()), launch.name
        for name, argument in zip(launch.signature, arguments, strict=True):
            value = argument.data_ptr() if isinstance(argument, Tensor) else argument
            assert name not in launch.aligned or value % 16 == 0, f"{launch.name}: {name} = {value}"


class Binary(CompiledKernel):
    """Replaces compiled code: records what it is launched with, by Triton (`binary[grid]`) and directly."""

    function, packed_metadata, module = "function", "metadata", None

    def __init__(self) -> None:
        self.by_triton: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []
        self._run = lambda *arguments: self.launches.append(arguments)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.by_triton.append((grid, *arguments))


class Kernel:
    """Replaces a Triton kernel; each launch makes code."""

    def __init__(self) -> None:
        self.binaries: list[Binary] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *arguments: Any, **options: Any) -> Binary:
        self.binaries.append(Binary())
        return self.binaries[-1]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> int:
    """The driver's current stream."""
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device: 77))
    return 77


def test_a_binary_is_launched_again_for_what_it_was_made_for_alone(stream: int) -> None:
    """Triton makes different code for addresses and integers divisible by 16, for 1, and for 64-bit integers."""
    kernel = Kernel()
    launch = Launch("copy", cast(Any, kernel), {"X": "*fp32", "n": "i32"}, {"BLOCK": 8}, num_warps=1)
    aligned = torch.zeros(64)
    numbers = (32, 33, 1, 2**31)
    for number in numbers:
        launch((4,), aligned, number)
    made = kernel.binaries
    assert len(made) == len(numbers) and not any(binary.launches for binary in made)
    for number in numbers:
        launch((4, 2), aligned[4:], number)
    assert len(made) == len(numbers)
    for number, binary in zip(numbers, made, strict=True):
        options = stream, "function", "metadata", None, None, None
        assert binary.launches == [(4, 2, 1, *options, aligned[4:].data_ptr(), number, 8)]
    for _ in range(2):
        launch((4,), aligned[1:], 32)
    assert len(made) == len(numbers) + 2 and len(made[0].launches) == 1, "other addresses: Triton chooses every time"
    replace(launch, num_warps=2)((4,), aligned, 32)
    assert len(made) == len(numbers) + 3, "another launch has its own"


def test_hooks_see_every_launch(stream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launch("copy", cast(Any, kernel), {"X": "*fp32"}, {"BLOCK": 8}, num_warps=1)
    launch((4,), x)
    (binary,) = kernel.binaries
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        with monkeypatch.context() as patch:
            patch.setattr(hooks, "calls", [print])
            launch((4,), x)
    assert [grid for grid, *_ in binary.by_triton] == [(4, 1, 1)] * 2 and not binary.launches
    assert all(given is x and block == 8 for _, given, block in binary.by_triton)


def test_binaries_for_ever_new_sizes_do_not_gather(stream: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titan_kernels.launch._MOST_KEPT", 4)
    launch = Launch("copy", cast(Any, Kernel()), {"X": "*fp32", "n": "i32"}, {}, num_warps=1)
    for n in range(100):
        launch((4,), torch.zeros(64), n)
        assert 0 < len(launch._compiled) <= 4


def test_on_rocm_triton_chooses_at_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it makes different code for tensors of more than 2 GiB."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernel = Kernel()
    launch = Launch("copy", cast(Any, kernel), {"X": "*fp32"}, {}, num_warps=1)
    for _ in range(2):
        launch((4,), torch.zeros(64))
    assert len(kernel.binaries) == 2


def test_vectorised_by_torch_func(device: torch.device) -> None:
    x, weight = torch.randn(3, 4, 32, device=device), torch.randn(32, device=device)
    whole = titan_kernels.rms_norm(x, weight, 1e-5)
    each = torch.func.vmap(lambda rows: titan_kernels.rms_norm(rows, weight, 1e-5))(x)
    torch.testing.assert_close(each, whole, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
def test_checkpoint_policies_name_the_operators(
    save: bool, compiled: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    named = {OPS.rms_norm.default, OPS.swiglu.default} if save else set()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in named else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x: Tensor, weight: Tensor) -> Tensor:
        y = titan_kernels.rms_norm(x, weight, 1e-5)
        return titan_kernels.swiglu(y.sin(), y.cos()).sin()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        out = checkpoint(block, x, weight, use_reentrant=False, context_fn=contexts)
        assert isinstance(out, Tensor)
        return out

    x, weight = (torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 32), (32,)))
    function = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    found = torch.autograd.grad(function(x, weight).sum(), (x, weight))
    counts = recorder.counts()
    assert counts["rms_norm_forward"] == counts["swiglu_forward"] == (1 if save else 2)
    expected = torch.autograd.grad(block(x, weight).sum(), (x, weight))
    torch.testing.assert_close(found, expected)


@each_operator
def test_as_many_flops_as_the_reference(operator: Operator, device: torch.device) -> None:
    counts = []
    for function in (operator.ours, operator.reference):
        inputs = leaves(operator, 3, device)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(total(function(*inputs)), inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert (counts[0] > 0) == operator.name.endswith("_linear")


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    result = python(
        "import torch, titan_kernels\n"
        "try: titan_kernels.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)\n"
        "except ValueError as error: print(error)"
    )
    assert "needs CUDA tensors, got shape [2, 8] on cpu" in result.stdout, result.stderr


def test_reference_works_without_triton() -> None:
    result = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, titan_kernels\n"
        "from titan_kernels import reference\n"
        "print(reference.rms_norm(torch.ones(1, 2), torch.ones(2), 0.0).tolist(), hasattr(titan_kernels, 'swiglu'))"
    )
    assert result.stdout.strip() == "[[1.0, 1.0]] False", result.stderr
