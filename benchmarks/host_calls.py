"""Eager calls at a size at which the kernel takes no time, which leaves Python and the dispatcher."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from titan_kernels.rms_norm import rms_norm_op
from torch import Tensor

from benchmarks.measurement import differentiable, gradients_like
from benchmarks.providers import EAGER, EPS, OURS, build, loss_ops, make_inputs
from benchmarks.shapes import ALONE, SMOKE_MODEL, UNITS, Case


@dataclass(frozen=True)
class HostCall:
    """One direction of one operator, ours or the reference. `variant`: another way to call ours."""

    op: str
    direction: str
    provider: str
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.op, self.direction, self.provider, self.variant)))

    def bind(self, device: torch.device) -> Callable[[], object]:
        """The call, on its own tensors."""
        if self.direction == "step":
            return self._bind_loss(device)
        case = Case(self.op, SMOKE_MODEL, 1, 8, "alone")
        inputs = make_inputs(case, device)
        if self.variant == "custom_op":
            return lambda: rms_norm_op(*inputs, EPS)
        function = build(case, EAGER if self.provider == "eager" else OURS, "eager", device)
        if self.variant == "no_grad":
            inputs = tuple(x.detach() for x in inputs)
        if self.direction == "forward":
            return lambda: function(*inputs)
        outputs = function(*inputs)
        gradients, wanted = gradients_like(outputs), differentiable(inputs)
        return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    def _bind_loss(self, device: torch.device) -> Callable[[], object]:
        logits, labels, scale = make_inputs(Case("cross_entropy", SMOKE_MODEL, 1, 8, "alone"), device)
        ops = loss_ops(EAGER if self.provider == "eager" else OURS, "eager")
        logsumexp = torch.logsumexp(logits.float(), -1)
        arguments: dict[str, tuple[Tensor | int | float, ...]] = {
            "cross_entropy_with_grad_": (logits, labels, scale, -100, 0.0),
            "cross_entropy_stats": (logits, labels, 0),
            "cross_entropy_grad_": (logits, labels, 0, logsumexp, scale, -100, 0.0),
        }
        function, given = getattr(ops, self.op), arguments[self.op]
        return lambda: function(*given)


WITH_BACKWARD = tuple(op for op in (*ALONE, *UNITS) if not op.startswith("cross_entropy"))
LOSSES = ("cross_entropy_with_grad_", "cross_entropy_stats", "cross_entropy_grad_")
HOST_CALLS = (
    *(HostCall(op, way, who) for op in WITH_BACKWARD for way in ("forward", "backward") for who in ("ours", "eager")),
    *(HostCall(op, "step", who) for op in LOSSES for who in ("ours", "eager")),
    HostCall("rms_norm", "forward", "ours", "no_grad"),
    HostCall("rms_norm", "forward", "ours", "custom_op"),
)
