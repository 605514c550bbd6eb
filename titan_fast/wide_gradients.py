"""Weight gradients that come out of their matrix product in the dtype in which FSDP2 reduces them.

    dW = dy^T x

is summed in float32 by the tensor cores. Written in the weight's bfloat16 it is rounded, and then read and written once
more to be widened for the reduction: for a Llama 3 8B block 436 MB written, 436 read and 872 written. Here the product
writes float32, and `direct_fsdp` reduces from there: 872 MB written.

Autograd only accepts gradients of a tensor's own dtype. So each matrix has a "port" beside it: a leaf of the same shape
and the wide dtype, which takes no memory and receives the gradient.
"""

import dataclasses
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from titan_fast import config
from titan_fast.errors import ConfigError
from titan_fast.loss import LinearCrossEntropy
from titan_fast.model import Head, Linear, Llama

_KEPT_APART = hasattr(FSDPParam, "to_accumulated_grad_if_needed")
"""Whether FSDP2 keeps gradients of the reduction's dtype in a separate attribute. From torch 2.15 on, a parameter's
`grad` itself may have that dtype."""
_USED = (
    (FSDPParamGroup, "post_backward"),
    (FSDPParam, "to_accumulated_grad_if_needed" if _KEPT_APART else "unsharded_grad_dtype"),
)
"""Parts of FSDP2 that are used here and are not public."""


class WideLinear(Linear):
    """A `Linear` that leaves its weight's gradient in `port.grad`."""

    port: Tensor
    """[out, in] in the gradient's dtype; an expanded scalar."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.port)


def check(settings: config.Config, shards: int, tensor_degree: int, param: torch.dtype, direct: bool) -> None:
    """ConfigError where `parallelism.fsdp_wide_gradients` is True and cannot work, or would change nothing."""
    found = _obstacles(settings, shards, tensor_degree, param, direct)
    if settings.parallelism.fsdp_wide_gradients and found:
        problem, hint = found[0]
        raise ConfigError(f"parallelism.fsdp_wide_gradients {problem}", hint)


def wanted(settings: config.Config, shards: int, tensor_degree: int, param: torch.dtype, direct: bool) -> bool:
    """`parallelism.fsdp_wide_gradients` with None resolved. A `torch.autograd.Function` saves its inputs after it has
    run, so in eager mode recomputation would have to run one more product of a block, which costs more than is gained.
    With float8 it has not been timed."""
    if settings.parallelism.fsdp_wide_gradients is not None:
        return settings.parallelism.fsdp_wide_gradients
    if settings.float8.enable:
        return False
    if settings.activation_checkpoint.mode != "none" and not settings.compile.takes("blocks", "model"):
        return False
    return not _obstacles(settings, shards, tensor_degree, param, direct)


def _obstacles(
    settings: config.Config, shards: int, tensor_degree: int, param: torch.dtype, direct: bool
) -> list[tuple[str, str]]:
    """(why gradients cannot be wide, what to do about it), for each reason."""
    reduce = settings.training.mixed_precision_reduce
    dtypes = f"computes in {str(param).removeprefix('torch.')} and reduces in {reduce}"
    unknown = [f"{kind.__name__}.{name}" for kind, name in _USED if not hasattr(kind, name)]
    found = (
        (bool(unknown), f"needs FSDP2's {' and '.join(unknown)}, which torch {torch.__version__} lacks", "turn it off"),
        (shards == 1, "needs several shards", "turn it off"),
        (tensor_degree > 1, f"does not work with tensor_parallel_degree {tensor_degree}", "use one of them"),
        (
            param == torch.float32 or reduce != "float32",
            f"has nothing to widen where a run {dtypes}",
            "turn it off, or compute in bfloat16 and reduce in float32",
        ),
        (not direct, "needs direct buffers, and they are flat", "use --parallelism.fsdp_buffers direct"),
        (
            settings.float8.enable and settings.float8.recipe_name == "rowwise",
            "does not work with float8.recipe_name rowwise, whose products are bfloat16",
            "use tensorwise, or turn one of them off",
        ),
        (
            settings.activation_checkpoint.mode == "memory_budget",
            "does not work with activation_checkpoint.mode memory_budget, since the compiler would count the places "
            "that gradients leave through against the budget",
            "use another mode, or turn it off",
        ),
        (
            settings.kernels.reemit == "triton",
            "does not work with kernels.reemit 'triton', which has products of its own",
            "use one of them",
        ),
    )
    return [(problem, hint) for wrong, problem, hint in found if wrong]


def widen(module: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Makes every `Linear` within `module` a `WideLinear` with gradients of `dtype`, and gives the loss of a head a
    port, in place."""
    for matrix in module.modules():
        if isinstance(matrix, Linear):
            matrix.__class__ = WideLinear
            matrix.port = _new_port(matrix.weight, dtype, device)
        elif isinstance(matrix, Head) and isinstance(matrix.loss, LinearCrossEntropy):
            matrix.loss = dataclasses.replace(matrix.loss, port=_new_port(matrix.weight, dtype, device))


def _new_port(weight: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(weight.shape).requires_grad_()


def unwiden(module: nn.Module) -> None:
    """Undoes `widen`."""
    for matrix in module.modules():
        if isinstance(matrix, WideLinear):
            matrix.__class__ = Linear  # type: ignore[assignment]
            del matrix.port
        elif isinstance(matrix, Head) and isinstance(matrix.loss, LinearCrossEntropy):
            matrix.loss = dataclasses.replace(matrix.loss, port=None)


def gradients(block: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every parameter of `block`, by name; from its port, where it has one."""
    found = {name: parameter.grad for name, parameter in block.named_parameters()}
    return found | {f"{name}.weight": m.port.grad for name, m in block.named_modules() if isinstance(m, WideLinear)}


def use(model: Llama, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Makes the blocks of `model` and its head, where they are FSDP2 units, compute their matrices' gradients in
    `dtype`; None: as autograd does. A head that is tied to the embedding, or whose loss is torch's, stays as it is."""
    for module in (*model.blocks, model.head):
        if not isinstance(module, FSDPModule):
            continue
        unit: Any = module._get_fsdp_state()._fsdp_param_group
        if dtype is not None:
            widen(cast(nn.Module, module), dtype, device)
            unit.post_backward = functools.partial(_post_backward, unit)
        else:
            unwiden(cast(nn.Module, module))
            vars(unit).pop("post_backward", None)


def _post_backward(unit: Any, *unused: Any) -> None:
    """Runs FSDP2's own `post_backward`, after moving the gradients in the ports to where it expects gradients of the
    reduction's dtype. Where that is a separate attribute, it expects all of the unit's gradients there."""
    assert unit.reduce_grads, "what an earlier pass left would be lost"
    for parameter in unit.fsdp_params:
        port = _port(parameter._module_info.module)
        if port is not None and _KEPT_APART:
            parameter.unsharded_accumulated_grad, port.grad = port.grad, None
        elif port is not None:
            parameter.unsharded_param.grad, port.grad = port.grad, None
        elif _KEPT_APART and hasattr(parameter, "_unsharded_param"):
            parameter.to_accumulated_grad_if_needed()
    type(unit).post_backward(unit)


def _port(module: nn.Module) -> Tensor | None:
    """The port of a matrix whose gradient is wide, else None."""
    if isinstance(module, Head):
        return module.loss.port if isinstance(module.loss, LinearCrossEntropy) else None
    return module.port if isinstance(module, WideLinear) else None
