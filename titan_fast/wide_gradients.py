"""Weight gradients that leave their matrix product in the dtype in which FSDP2 reduces them.

    dW = dy^T x

is summed in float32 by the tensor cores. Written in the weight's bfloat16 it is rounded, and read and written once
more to be widened for the reduction: of a Llama 3 8B block 436 MB written, 436 read and 872 written. Here the product
writes float32, and `direct_fsdp` reduces from there: 872 MB written.

Autograd gives a tensor only a gradient of its own dtype. So each matrix has a port beside it: a leaf of its shape and
of the wide dtype, without memory of its own, through which the gradient comes out.
"""

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.library import Library

from titan_fast import config
from titan_fast.errors import ConfigError
from titan_fast.model import Linear, Llama


class WideLinear(Linear):
    """`Linear`, whose weight's gradient is left in `port.grad`."""

    port: Tensor
    """[out, in] in the gradient's dtype; every element is the same one."""

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.port)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, port: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wide = port.dtype
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[2]:
            dw = torch.mm(dy.flatten(0, -2).t(), x.flatten(0, -2), out_dtype=ctx.wide)
        return dx, None, dw


def check(
    settings: config.Config, shards: int, tensor_degree: int, param: torch.dtype, direct: bool, device_type: str
) -> None:
    """ConfigError where `parallelism.fsdp_wide_gradients` asks for what cannot be, or would change nothing."""
    if not settings.parallelism.fsdp_wide_gradients:
        return
    compiles, training = settings.compile, settings.training
    inductor = compiles.enable and compiles.backend == "inductor" and "blocks" in compiles.components
    dtypes = f"computes in {str(param).removeprefix('torch.')} and reduces in {training.mixed_precision_reduce}"
    for wrong, problem, hint in (
        (shards == 1, "has nothing to widen on one shard", "turn it off"),
        (tensor_degree > 1, f"cannot be with tensor_parallel_degree {tensor_degree}", "take one of them"),
        (
            param == torch.float32 or training.mixed_precision_reduce != "float32",
            f"has nothing to widen where a run {dtypes}",
            "turn it off, or compute in bfloat16 and reduce in float32",
        ),
        (not direct, "needs direct buffers, and they are flat", "take --parallelism.fsdp_buffers direct"),
        (settings.float8.enable, "cannot be with float8.enable, which has products of its own", "take one of them"),
        (
            settings.kernels.reemit == "triton",
            "cannot be with kernels.reemit 'triton', which has products of its own",
            "take one of them",
        ),
        (
            device_type == "cpu" and inductor,
            "needs a product that Inductor does not have for a CPU",
            "turn compile.enable or it off",
        ),
    ):
        if wrong:
            raise ConfigError(f"parallelism.fsdp_wide_gradients {problem}", hint)


def widen(module: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Makes every `Linear` within `module` a `WideLinear` with gradients of `dtype`, in place."""
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.__class__ = WideLinear
            linear.port = torch.zeros((), dtype=dtype, device=device).expand(linear.weight.shape).requires_grad_()


def ports(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name within `module`, port) of every `WideLinear`."""
    for name, linear in module.named_modules():
        if isinstance(linear, WideLinear):
            yield name, linear.port


def narrow(module: nn.Module) -> None:
    """Takes back what `widen` did."""
    for linear in module.modules():
        if isinstance(linear, WideLinear):
            linear.__class__ = Linear  # type: ignore[assignment]
            del linear.port


def use(model: Llama, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Makes the blocks of `model`, where they are FSDP2 units, get their matrices' gradients in `dtype`; with None as
    autograd makes them."""
    for block in model.blocks:
        if not isinstance(block, FSDPModule):
            continue
        unit: Any = block._get_fsdp_state()._fsdp_param_group
        if dtype is not None:
            widen(cast(nn.Module, block), dtype, device)
            unit.post_backward = functools.partial(_post_backward, unit)
        else:
            narrow(cast(nn.Module, block))
            vars(unit).pop("post_backward", None)


def _post_backward(unit: Any, *unused: Any) -> None:
    """FSDP2's own, after the unit's gradients are all where it keeps those that are of the reduction's dtype."""
    for parameter in unit.fsdp_params:
        linear = parameter._module_info.module
        if isinstance(linear, WideLinear):
            parameter.unsharded_accumulated_grad, linear.port.grad = linear.port.grad, None
        elif hasattr(parameter, "_unsharded_param"):
            parameter.to_accumulated_grad_if_needed()
    type(unit).post_backward(unit)


def _product_on_cpu(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    return left.to(out_dtype) @ right.to(out_dtype)


_library = Library("aten", "IMPL")
"""torch has this product for GPUs alone (2.13)."""
if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", "CPU"):
    _library.impl("mm.dtype", _product_on_cpu, "CPU")
