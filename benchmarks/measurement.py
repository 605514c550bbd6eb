"""Measures a case: each provider's results and gradients are checked against the eager reference, then timed in turn.

A provider that cannot be built, raises, runs out of memory or is wrong has a `problem` and no samples; the others are
still measured.
"""

import functools
import gc
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.contests import rivals
from benchmarks.providers import EAGER, Function, Provider, Unavailable, build, make_inputs, providers
from benchmarks.shapes import Case
from benchmarks.timing import Difference, Run, Samples, difference, measure

# A provider's error may be this many times that of the eager bfloat16 reference, both compared with the reference in
# float32, plus two units in bfloat16's last place (some return even the loss in bfloat16). Triton's interpreter, which
# the CPU uses, truncates to bfloat16 where a GPU rounds: twice the error. A wrong row shows in the worst row, not in
# all.
ERROR_FACTOR = {"cuda": 2.0, "cpu": 4.0}
ERROR_FLOOR = 2.0**-7

# (passes, calls per pass). Verdicts are from differences in each pass, so there are many.
EFFORT = {"alone": (12, 5), "block": (16, 4)}


class DeviceLost(Exception):
    """The device no longer responds, for example after an illegal access, and this process can measure nothing more."""


@dataclass
class Measured:
    """The results of one provider. `problem` says why there are no samples; `failed`: it is because something is wrong
    with the provider, and not because it is unavailable; `wrong`: its results are."""

    samples: dict[str, Samples] = field(default_factory=dict)
    """By direction."""
    against: dict[str, dict[str, Difference]] = field(default_factory=dict)
    """By direction and rival."""
    peak_bytes: int = 0
    """Memory for one forward and backward besides its inputs and the gradients of its outputs. 0 without CUDA."""
    problem: str = ""
    failed: bool = False
    wrong: bool = False


@dataclass
class MeasuredCase:
    providers: dict[str, Measured]
    seconds: float
    """How long everything took, including compilation."""


def directions(case: Case) -> tuple[str, ...]:
    """The loss computes its gradient in the forward pass, so a step is both."""
    return ("step",) if case.op.startswith("cross_entropy") or case.op == "head" else ("forward", "backward")


def differentiable(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x for x in inputs if x.requires_grad)


def fresh(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)


def widened(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values in float32."""
    return tuple(x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)


def gradients_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random gradients of `outputs`, in their memory layout: attention returns the gradients of q, k and v in theirs,
    token by token."""
    generator = torch.Generator(outputs[0].device).manual_seed(21)

    def gradient(x: Tensor) -> Tensor:
        values = torch.randn(x.shape, generator=generator, device=x.device).bfloat16()
        return torch.empty_like(x).copy_(values)

    return tuple(gradient(x.detach()) for x in outputs)


def results(
    case: Case, function: Function, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Outputs and the gradients of all differentiable inputs."""
    outputs = function(*inputs)
    if directions(case) == ("step",):
        return outputs
    found = torch.autograd.grad(outputs, differentiable(inputs), gradients)
    return *(output.detach() for output in outputs), *found


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(relative error of the whole tensor, of its worst row), root mean square. A row's norm counts as at least the
    average one, so that the relative error of a row of near zeros is small."""
    truth = truth.float().reshape(-1, truth.shape[-1] if truth.dim() else 1)
    error = found.float().reshape(truth.shape) - truth
    typical = truth.norm() / len(truth) ** 0.5
    worst = (error.norm(dim=1) / truth.norm(dim=1).clamp(min=typical)).max()
    return float(error.norm() / truth.norm()), float(worst)


def disagreement(found: tuple[Tensor, ...], reference: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> str:
    """Empty if `found` is about as close to `truth` as `reference` is; else the first tensor that is not."""
    if len(found) != len(truth):
        return f"{len(found)} results instead of {len(truth)}"
    for index, (mine, theirs, true) in enumerate(zip(found, reference, truth, strict=True)):
        if mine.shape != true.shape:
            return f"result {index} has shape {list(mine.shape)} instead of {list(true.shape)}"
        for where, error, usual in zip(("all", "the worst row"), errors(mine, true), errors(theirs, true), strict=True):
            limit = ERROR_FACTOR[true.device.type] * usual + ERROR_FLOOR
            if not error <= limit:  # true for NaN
                return f"result {index} is off by {error:.1e} in {where}; the eager reference by {usual:.1e}"
    return ""


@contextmanager
def nan_where_unwritten() -> Iterator[None]:
    """Inside, `torch.empty` returns tensors full of NaN, so that elements which a kernel does not write are noticed;
    otherwise they may be those of a correct result that was in the same memory. Not for attention or code that Dynamo
    traces, which deterministic algorithms change."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def fault(
    case: Case,
    function: Function,
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    reference: tuple[Tensor, ...],
    truth: tuple[Tensor, ...],
    fills: bool = True,
) -> str:
    """What is wrong with the results of `function`, or "". fills: new memory is filled as by `nan_where_unwritten`. It
    may write to its arguments, which are copies."""
    with nan_where_unwritten() if fills else nullcontext():
        found = results(case, function, fresh(inputs), copies(gradients))
    return disagreement(found, reference, truth)


def measure_case(
    case: Case, names: set[str], device: torch.device, backend: str, passes: int, calls: int
) -> MeasuredCase:
    """All providers of `case` named in `names`, and those that they are compared with.

    Raises:
        DeviceLost: the device can no longer be used.
    """
    start = time.perf_counter()
    torch._dynamo.reset()
    names = names | {rival for name in names for rival in rivals(case, name)}
    chosen = {p.name: p for p in providers(case) if p.name in names}
    found = {name: Measured() for name in chosen}
    whole = Measured()
    with _caught(whole, device):
        inputs = make_inputs(case, device)
        functions, gradients = _checked(case, chosen, found, inputs, device, backend)
        _time(case, functions, found, inputs, gradients, device, passes, calls)
    for measured in found.values():
        if not measured.problem and measured.samples.keys() != set(directions(case)):
            measured.problem, measured.failed = f"the case could not be measured: {whole.problem}", True
    return MeasuredCase(found, time.perf_counter() - start)


@contextmanager
def _caught(measured: Measured, device: torch.device) -> Iterator[None]:
    """Exceptions inside become the problem of `measured`."""
    try:
        yield
        _wait(device)  # so that a kernel's errors are attributed to the provider that launched it
    except Unavailable as error:
        measured.problem = str(error)
    except Exception as error:
        note_failure(measured, error)
    else:
        return
    gc.collect()  # a traceback keeps the tensors of its frames alive
    try:
        _wait(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(f"after: {measured.problem}") from error


def note_failure(measured: Measured, error: Exception) -> None:
    """Keeps the error's type, message and innermost frames, but not the traceback, which keeps memory alive."""
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:])
    message = str(error).strip()[:2000]
    measured.problem, measured.failed = f"{type(error).__name__}: {message}\n{frames}", True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _checked(
    case: Case,
    chosen: dict[str, Provider],
    found: dict[str, Measured],
    inputs: tuple[Tensor, ...],
    device: torch.device,
    backend: str,
) -> tuple[dict[str, Function], tuple[Tensor, ...]]:
    """(the functions of the providers that agree with the reference, the gradients of the outputs). Also notes peaks of
    memory."""
    gradients, reference, truth = truths(case, inputs, device)
    functions = {}
    for name, provider in chosen.items():
        measured = found[name]
        with _caught(measured, device):
            function = build(case, provider, backend, device)
            fills = not (provider.compiled or case.op.startswith("block"))
            if problem := fault(case, function, inputs, gradients, reference, truth, fills):
                measured.problem, measured.failed, measured.wrong = f"wrong: {problem}", True, True
                continue
            run = functools.partial(results, case, function)
            measured.peak_bytes = peak_bytes(run, fresh(inputs), copies(gradients), device)
            functions[name] = function
    return functions, gradients


def truths(
    case: Case, inputs: tuple[Tensor, ...], device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(gradients of the outputs, the eager reference's results, its results in float32)."""
    eager = build(case, EAGER, "eager", device)
    gradients: tuple[Tensor, ...] = ()
    if directions(case) != ("step",):
        gradients = gradients_like(eager(*fresh(inputs)))
    reference = results(case, eager, fresh(inputs), gradients)
    return gradients, reference, results(case, eager, widened(inputs), tuple(x.float() for x in gradients))


def copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in tensors)  # clone keeps the memory layout


def _time(
    case: Case,
    functions: dict[str, Function],
    found: dict[str, Measured],
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    device: torch.device,
    passes: int,
    calls: int,
) -> None:
    working_set = sum(x.numel() * x.element_size() for x in inputs)
    for direction in directions(case):
        runs = {}
        for name, function in functions.items():
            if not found[name].problem:
                with _caught(found[name], device):
                    runs[name] = run_of(case, direction, function, inputs, copies(gradients))

        def on_failure(name: str, error: Exception) -> None:
            with _caught(found[name], device):
                raise error

        samples = measure(runs, device, working_set, passes, calls, on_failure)
        for name, taken in samples.items():
            found[name].samples[direction] = taken
            theirs = {rival: samples[rival] for rival in rivals(case, name) if rival in samples}
            found[name].against[direction] = {rival: difference(taken, other) for rival, other in theirs.items()}


def run_of(
    case: Case, direction: str, function: Function, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> Run:
    """The loss and SwiGLU get their own inputs, which are restored before each call, since some providers overwrite
    them, and thereby what they saved for the backward pass."""
    own = inputs
    reset: Callable[[], object] | None = None
    if case.op.startswith("cross_entropy") or case.op == "swiglu":
        own = fresh(inputs)
        reset = functools.partial(_restore, own, inputs)

    if direction != "backward":
        return Run(lambda: function(*own), reset)
    outputs = function(*own)
    wanted = differentiable(own)
    return Run(lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True), reset)


def _restore(tensors: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value.data)  # through .data: autograd must not see the write


def peak_bytes(
    run: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], object],
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    device: torch.device,
) -> int:
    """As `Measured.peak_bytes`."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(inputs, gradients)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
