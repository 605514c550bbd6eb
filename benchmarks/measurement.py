"""One case measured: each provider's results and gradients checked against the eager reference, then timed in turn."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.providers import EAGER, Function, Provider, Unavailable, build, make_inputs, providers
from benchmarks.shapes import Case
from benchmarks.timing import Run, Samples, measure

# A provider may be this much worse than the eager bfloat16 reference, both judged by the reference in float32, plus
# two units in bfloat16's last place (some return even the loss in bfloat16). Triton's interpreter, which is what runs
# on the CPU, cuts bfloat16 off where a GPU rounds it: twice the error. A wrong row shows in the worst row, not in all.
ERROR_FACTOR = {"cuda": 2.0, "cpu": 4.0}
ERROR_FLOOR = 2.0**-7


@dataclass
class Measured:
    """What one provider did. `problem` says why there are no samples; `wrong` that the reason is a wrong result."""

    samples: dict[str, Samples] = field(default_factory=dict)
    """By direction."""
    peak_bytes: int = 0
    problem: str = ""
    wrong: bool = False


def directions(case: Case) -> tuple[str, ...]:
    """The loss forms its gradient in the forward pass: a step is both."""
    return ("step",) if case.op == "cross_entropy" else ("forward", "backward")


def differentiable(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x for x in inputs if x.requires_grad)


def fresh(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)


def widened(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values in float32."""
    return tuple(x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs)


def gradients_like(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(outputs[0].device).manual_seed(21)
    return tuple(torch.randn(x.shape, generator=generator, device=x.device).bfloat16().to(x.dtype) for x in outputs)


def results(case: Case, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs and the gradients of all differentiable inputs."""
    outputs = function(*inputs)
    if directions(case) == ("step",):
        return outputs
    gradients = torch.autograd.grad(outputs, differentiable(inputs), gradients_like(outputs))
    return *(output.detach() for output in outputs), *gradients


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(relative error of the whole tensor, of its worst row), root mean square. A row counts at least as large as the
    average one, so that a row of near zeros has no error of its own."""
    truth = truth.float().reshape(-1, truth.shape[-1] if truth.dim() else 1)
    error = found.float().reshape(truth.shape) - truth
    typical = truth.norm() / len(truth) ** 0.5
    worst = (error.norm(dim=1) / truth.norm(dim=1).clamp(min=typical)).max()
    return float(error.norm() / truth.norm()), float(worst)


def disagreement(found: tuple[Tensor, ...], reference: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> str:
    """Empty where `found` is about as near to `truth` as `reference` is; else the first tensor that is not."""
    if len(found) != len(truth):
        return f"{len(found)} results instead of {len(truth)}"
    for index, (mine, theirs, true) in enumerate(zip(found, reference, truth, strict=True)):
        if mine.shape != true.shape:
            return f"result {index} has shape {list(mine.shape)} instead of {list(true.shape)}"
        for where, error, usual in zip(("all", "the worst row"), errors(mine, true), errors(theirs, true), strict=True):
            limit = ERROR_FACTOR[true.device.type] * usual + ERROR_FLOOR
            if not error <= limit:  # NaN is no agreement
                return f"result {index} is off by {error:.1e} in {where}; the eager reference by {usual:.1e}"
    return ""


def measure_case(
    case: Case, names: set[str], device: torch.device, backend: str, passes: int, calls: int
) -> dict[str, Measured]:
    """All providers of `case` named in `names`. Providers that fail their check are not timed."""
    torch._dynamo.reset()
    inputs = make_inputs(case, device)
    eager = build(case, EAGER, backend)
    reference, truth = results(case, eager, fresh(inputs)), results(case, eager, widened(inputs))
    found = {p.name: Measured() for p in providers(case) if p.name in names}
    functions: dict[str, tuple[Provider, Function]] = {}
    for provider in providers(case):
        if provider.name not in names:
            continue
        measured = found[provider.name]
        try:
            function = build(case, provider, backend)
            measured.problem = disagreement(results(case, function, fresh(inputs)), reference, truth)
        except Unavailable as error:
            measured.problem = f"{provider.name}: {error}"
        else:
            measured.wrong = bool(measured.problem)
            if not measured.wrong:
                functions[provider.name] = (provider, function)
                measured.peak_bytes = peak_bytes(functools.partial(results, case, function), inputs, device)
    del reference, truth
    _time(case, functions, inputs, found, device, passes, calls)
    return found


def _time(
    case: Case,
    functions: dict[str, tuple[Provider, Function]],
    inputs: tuple[Tensor, ...],
    found: dict[str, Measured],
    device: torch.device,
    passes: int,
    calls: int,
) -> None:
    if not functions:
        return
    working_set = sum(x.numel() * x.element_size() for x in inputs)
    for direction in directions(case):
        runs = {name: _run(case, direction, *pair, inputs) for name, pair in functions.items()}
        for name, samples in measure(runs, device, working_set, passes, calls).items():
            found[name].samples[direction] = samples


def _run(case: Case, direction: str, provider: Provider, function: Function, inputs: tuple[Tensor, ...]) -> Run:
    own = inputs
    reset: Callable[[], object] | None = None
    if case.context == "alone" and case.op in provider.operators().overwrites:
        own = fresh(inputs)
        reset = functools.partial(_restore, own, inputs)

    if direction != "backward":
        return Run(lambda: function(*own), reset)
    outputs = function(*own)
    gradients, wanted = gradients_like(outputs), differentiable(own)
    return Run(lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True), reset)


def _restore(tensors: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value.data)  # through .data: autograd must not see the write


def peak_bytes(call: Callable[[tuple[Tensor, ...]], object], inputs: tuple[Tensor, ...], device: torch.device) -> int:
    """Memory that one forward and backward needs beyond its inputs. 0 without CUDA."""
    if device.type != "cuda":
        return 0
    own = fresh(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(own)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
