"""How wrong a kernel may be: the error rule of all numerics tests.

The truth is the reference in float64, and the yardstick is the reference in the dtype under test. In each row (the last
dimension) the kernel's largest error may be twice the yardstick's plus one unit in the last place (the rule of
flash-attention's tests; four units in float32, see `Allowance`). The relative root-mean-square error over the whole
tensor stays below a limit for the dtype (float32: or twice the yardstick's, if that is more). Both are relative, so
they also hold for a sum over rows, which grows with sqrt(rows), as its error does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RELATIVE_RMS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-6}


@dataclass(frozen=True)
class Allowance:
    """What is allowed on one device, in one dtype."""

    ulps: float
    relative_rms: float

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> "Allowance":
        if dtype == torch.bfloat16 and device.type == "cpu":
            # Triton's interpreter truncates float32 to bfloat16 instead of rounding: twice the error, at each store.
            return cls(ulps=2, relative_rms=2 * RELATIVE_RMS[dtype])
        if dtype == torch.float32:
            # Every operation rounds, and not in the same order as torch's: where few columns cancel to almost nothing,
            # this is up to 2 units beyond twice the yardstick's error (width 1, 40 seeds). On CUDA division,
            # exponential, logarithm and inverse root are PTX's approximate ones besides, each within 1 to 2 units (PTX
            # ISA: div.full, ex2.approx, lg2.approx, rsqrt.approx); torch's are closer.
            return cls(ulps=4, relative_rms=RELATIVE_RMS[dtype])
        return cls(ulps=1, relative_rms=RELATIVE_RMS[dtype])


@dataclass(frozen=True)
class Result:
    """What is known about one output or gradient besides its dtype."""

    terms: Tensor | None = None
    """Magnitudes, broadcastable to the result, of the terms that each element is a sum of, where they may cancel: the
    unit in the last place is theirs."""
    through: torch.dtype | None = None
    """A narrower dtype than its own, in which something that it is computed from was stored on the way."""


def assert_accurate(name: str, ours: Tensor, yardstick: Tensor, truth: Tensor, result: Result | None = None) -> None:
    """Compares `ours` with `truth` by the above rule."""
    result = result or Result()
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)}, not {list(truth.shape)}"
    assert ours.dtype == yardstick.dtype, f"{name}: {ours.dtype}, not {yardstick.dtype}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    if not truth.numel():
        return
    dtype = result.through or ours.dtype
    allowance, info = Allowance.of(dtype, ours.device), torch.finfo(dtype)
    truth = truth.double()
    error, yardstick_error = (ours.double() - truth).abs(), (yardstick.double() - truth).abs()
    size = truth.abs()
    if result.terms is not None:
        size = torch.maximum(size, result.terms.to(size).abs())
    unit = _row_max(size).clamp(min=info.smallest_normal) * info.eps
    largest, allowed = _row_max(error), 2 * _row_max(yardstick_error) + allowance.ulps * unit
    worst = (largest - allowed).argmax()
    assert (largest <= allowed).all(), (
        f"{name}: error {largest.flatten()[worst]:.3e} in row {worst}, allowed {allowed.flatten()[worst]:.3e}"
    )
    scale = size.square().mean().sqrt()
    if scale > info.smallest_normal:
        relative, yardstick_relative = (e.square().mean().sqrt() / scale for e in (error, yardstick_error))
        # The error of a long float32 product alone exceeds the limit, in torch's own kernels too.
        allowed = max(allowance.relative_rms, 2 * yardstick_relative.item() if dtype == torch.float32 else 0.0)
        assert relative <= allowed, f"{name}: relative RMS error {relative:.3e}, allowed {allowed:.1e}"


def assert_accurate_logits_gradient(
    ours: Tensor, yardstick: Tensor, truth: Tensor, labels: Tensor, scale: Tensor, ignore_index: int = -100
) -> None:
    """Compares the gradient of `sum(scale * cross_entropy)` for logits [N, V] with `truth`; scale: [N]. Labels and
    other columns are judged separately: softmax - 1 cancels at labels, and would hide the others, far smaller ones."""
    column = torch.where(labels != ignore_index, labels, 0)[:, None]
    mine, other, exact = (x.gather(1, column) for x in (ours, yardstick, truth))
    assert_accurate("gradient at the labels", mine, other, exact, Result(scale[:, None]))
    ours, yardstick, truth = (x.scatter(1, column, 0) for x in (ours, yardstick, truth))
    terms = None
    if ours.dtype == torch.float32:
        # exp(log p) is wrong by log(p) units if its argument is wrong by one, and four roundings follow. A narrower
        # result is wrong by its own rounding.
        share = (truth / scale[:, None]).abs().clamp(min=torch.finfo(torch.float32).tiny, max=1)
        terms = truth * (4 + torch.log(share).abs())
    assert_accurate("gradient at the other columns", ours, yardstick, truth, Result(terms))


def _row_max(x: Tensor) -> Tensor:
    return x.amax(-1) if x.dim() else x


def leaf(x: Any) -> Any:
    """A floating-point tensor as a leaf that requires a gradient, with its strides; anything else unchanged."""
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def double(x: Any) -> Any:
    """A floating-point tensor in float64; anything else unchanged."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def evaluate(
    function: Callable[..., Any], inputs: Sequence[Any], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], list[Any]]:
    """(outputs, gradients of the floating-point inputs or None) of `function`, given the gradients of its outputs."""
    leaves = [leaf(x) for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    found = torch.autograd.grad(outputs, wanted, list(gradients), allow_unused=True)
    return [output.detach() for output in outputs], list(found)


def compare(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    gradients: Sequence[Tensor],
    results: dict[str, Result] | None = None,
) -> None:
    """Compares `function` with `reference` on the same inputs, forward and backward, each result by `assert_accurate`.

    Results are named out0, out1, ... and grad0, grad1, ... (of the floating-point inputs).
    """
    ours = evaluate(function, inputs, gradients)
    yardstick = evaluate(reference, inputs, gradients)
    truth = evaluate(reference, [double(x) for x in inputs], [double(gradient) for gradient in gradients])
    for kind, *lists in zip(("out", "grad"), ours, yardstick, truth, strict=True):
        for i, (mine, other, exact) in enumerate(zip(*lists, strict=True)):
            name = f"{kind}{i}"
            assert (mine is None) == (exact is None), f"{name}: {mine} and {exact}"
            if exact is not None:
                assert_accurate(name, mine, other, exact, (results or {}).get(name))
