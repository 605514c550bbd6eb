"""One device without FSDP2: bfloat16 weights, and beside them the float32 masters that the optimizer updates.

On one device FSDP2 casts, in each step, every float32 weight to bfloat16 and every bfloat16 gradient to float32,
through buffers of its own: about 68 bytes of memory traffic per parameter and step. Here the weight is bfloat16 already
and its gradient is read as it is. With `optimizer` among `compile.components`, clipping and AdamW write master and
rounded weight in one pass, 30 bytes of traffic; otherwise torch's fused AdamW runs on gradients that are widened for
it, about 50. Both ways hold 16 bytes of state per parameter, and the arithmetic is the same: sums, moments and masters
are float32."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from titan_fast.shards import local

BUCKET_NUMEL = 2**27
"""How many elements of the gradients are widened to float32 at a time where the update is not compiled: 512 MiB."""


def keep_weights(model: nn.Module, kept: str, accumulates: bool) -> None:
    """Turns float32 weights into what `parallel.weights_kept` says: bfloat16 with masters, bfloat16 alone, or
    unchanged."""
    if kept == "masters":
        keep_masters(model, accumulates)
    elif kept == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


def keep_masters(model: nn.Module, accumulates: bool) -> None:
    """Rounds the float32 parameters of `model` to bfloat16 in place, and keeps the float32 values as the attribute
    `master` of each. With `accumulates`, gradients of several backward passes are summed in float32, as the attribute
    `gradient_sum`, and `grad` stays None."""
    for parameter in model.parameters():
        parameter.master = parameter.data  # type: ignore[attr-defined]
        parameter.data = parameter.data.bfloat16()
        if accumulates:
            parameter.gradient_sum = None  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_sum_in_float32)


def _sum_in_float32(parameter: Any) -> None:
    if parameter.gradient_sum is None:
        parameter.gradient_sum = parameter.grad.float()
    else:
        parameter.gradient_sum.add_(parameter.grad)
    parameter.grad = None


def master_of(parameter: Tensor) -> Tensor:
    """A parameter's float32 master, or itself where it has none. Detached."""
    return getattr(parameter, "master", parameter).detach()


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient of the whole step. It is float32 where passes were summed or the parameter is, else bfloat16."""
    total = getattr(parameter, "gradient_sum", None)
    return parameter.grad if total is None else total


def round_masters(model: nn.Module) -> None:
    """Rounds masters into the weights again; to be called after something else has written to the masters."""
    _round([p for p in model.parameters() if hasattr(p, "master")])


def set_gradient(parameter: Any, gradient: Tensor) -> None:
    """Makes `gradient` what `gradient_of` returns."""
    name = "gradient_sum" if hasattr(parameter, "gradient_sum") else "grad"
    setattr(parameter, name, gradient)


@contextmanager
def masters_as_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter is its float32 master, to be read or written. Afterwards the weights are rounded from
    it."""
    kept = [(p, p.data) for p in model.parameters() if hasattr(p, "master")]
    for parameter, _ in kept:
        parameter.data = parameter.master  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, weight in kept:
            parameter.data = weight
        round_masters(model)


def adamw_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The step count and the two moments of a parameter; made as AdamW itself makes them where there are none yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu")
        state["exp_avg"] = torch.zeros_like(master_of(parameter))
        state["exp_avg_sq"] = torch.zeros_like(master_of(parameter))
    return state


class OnePassAdamW(torch.optim.AdamW):
    """AdamW that applies the clipping factor, updates masters (or, where there are none, the parameters) and rounds
    masters into the weights. State is float32: step, exp_avg and exp_avg_sq, as torch's own has.

    compiled: one kernel a tensor that reads and writes everything once. Otherwise torch's fused AdamW, on gradients
    widened a bucket at a time.
    """

    def __init__(self, groups: Any, compiled: Callable[[Any], Any] | None, **defaults: Any) -> None:
        """compiled: what compiles a function; None for none. groups, defaults: torch.optim.AdamW's."""
        super().__init__(groups, fused=True, **defaults)
        self.factor: Tensor | None = None
        """All gradients are multiplied by this, 0-dim float32; None: by nothing."""
        self.found_inf: Tensor | None = None
        """0-dim float32. If nonzero, the step changes nothing; None counts as 0."""
        self._update = compiled(update) if compiled is not None else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the gradients as they are; `factor` and `found_inf` are used up."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if gradient_of(p) is not None]
            if not parameters:
                continue
            for parameter in parameters:
                adamw_state(self, parameter)
            if self._update is not None:
                self._in_one_pass(parameters, group)
            else:
                self._by_buckets(parameters, group)
        self.factor = self.found_inf = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Always sets gradients to None, including the sums of several passes."""
        super().zero_grad(set_to_none=True)
        for group in self.param_groups:
            for parameter in group["params"]:
                if hasattr(parameter, "gradient_sum"):
                    parameter.gradient_sum = None

    def _in_one_pass(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        device = parameters[0].device
        one = torch.ones((), device=device)
        bad = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        # With offloading, parameters are in host memory and the norm is not.
        factor = one if self.factor is None else self.factor.to(device)
        steps = [self.state[p]["step"] for p in parameters]
        torch._foreach_add_(steps, [(bad == 0).float()] * len(steps))
        beta1, beta2 = group["betas"]
        # The step count of one parameter serves all. It is 0 only where the very first step is not applied.
        now = steps[0].clamp(min=1.0)
        # What differs between steps or groups is passed as a tensor; as a Python number it would trigger recompilation.
        rate, decay = (torch.full_like(one, group[name]) for name in ("lr", "weight_decay"))
        changing = torch.stack((factor, bad, rate, decay, 1 - beta1**now, (1 - beta2**now).sqrt()))
        assert self._update is not None
        for parameter in parameters:
            state = self.state[parameter]
            weight = local(parameter.detach()) if hasattr(parameter, "master") else None
            moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
            gradient = gradient_of(parameter)
            assert gradient is not None
            self._update(
                weight, local(master_of(parameter)), local(gradient), *moments, changing, beta1, beta2, group["eps"]
            )

    def _by_buckets(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        bad = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        for bucket in _buckets(parameters):
            wide = [local(g).float() for g in map(gradient_of, bucket) if g is not None]
            if self.factor is not None:
                # Not into a gradient that already is float32: `wide` may be the gradient itself.
                wide = torch._foreach_mul(wide, self.factor)
            masters = [local(master_of(p)) for p in bucket]
            states = [self.state[p] for p in bucket]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1.0)
            torch._fused_adamw_(
                masters, wide, [local(s["exp_avg"]) for s in states], [local(s["exp_avg_sq"]) for s in states], [],
                steps, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False, grad_scale=None, found_inf=bad,
            )  # fmt: skip
            torch._foreach_sub_(steps, [bad] * len(steps))
            _round([p for p in bucket if hasattr(p, "master")])


def update(
    weight: Tensor | None, master: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, changing: Tensor,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """AdamW on one tensor, in place (Loshchilov and Hutter, arXiv:1711.05101). master, mean, square: float32; weight:
    bfloat16 or None, receives the rounded master; gradient: of either dtype. changing, float32 [6]: the gradient's
    factor, nonzero to change nothing, learning rate, weight decay, 1 - beta1^t, sqrt(1 - beta2^t)."""
    factor, bad, rate, decay, correction1, correction2 = changing.unbind()
    g = gradient.float() * factor
    m = mean + (g - mean) * (1 - beta1)
    v = square * beta2 + g * g * (1 - beta2)
    value = master * (1 - rate * decay) - rate / correction1 * m / (v.sqrt() / correction2 + eps)
    keep = bad != 0
    value = torch.where(keep, master, value)
    mean.copy_(torch.where(keep, mean, m))
    square.copy_(torch.where(keep, square, v))
    master.copy_(value)
    if weight is not None:
        weight.copy_(value)


def _round(parameters: Sequence[Tensor]) -> None:
    if parameters:
        torch._foreach_copy_([p.data for p in parameters], [master_of(p) for p in parameters])


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    numel = 0
    for parameter in parameters:
        if bucket and numel + parameter.numel() > BUCKET_NUMEL:
            yield bucket
            bucket, numel = [], 0
        bucket.append(parameter)
        numel += parameter.numel()
    yield bucket
