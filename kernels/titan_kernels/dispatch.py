"""A shortcut for eager mode, which bypasses the dispatcher if nothing needs to see the operator.

Calling a `torch.library.custom_op` takes about 20 us more of the host's time than an autograd.Function with the same
code. Compilation, DTensor and dispatch modes (selective checkpointing, FLOP counting, fake tensors) need the operator;
plain eager training does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Private, so they may disappear: then every call goes through the dispatcher, which is only slower.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms: Callable[[], Any] = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", tuple)


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether no compiler, dispatch mode, torch.func transform or subclass would see a call on these tensors.

    NotImplementedError for forward-mode derivatives, which would silently treat an operator as a constant, and still do
    in compiled code.
    """
    if torch.compiler.is_compiling():
        return False
    transforms = _transforms()
    if getattr(forward_ad, "_current_level", 0) >= 0:
        _refuse_forward_mode(transforms, tensors)
    if transforms is not None or _dispatch_modes():
        return False
    return all(type(tensor) in (Tensor, Parameter) and not tensor.is_meta for tensor in tensors)


def _refuse_forward_mode(transforms: Any, tensors: Sequence[Tensor]) -> None:
    within = any(transform.key().name == "Jvp" for transform in transforms or ())
    if within or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "titan_kernels: the operators have derivatives in reverse mode alone, and this is forward mode "
            "(torch.func.jvp, jacfwd, hessian, linearize, or forward_ad); use backward() or torch.autograd.grad"
        )


def unrecorded_dispatch(implementation: Callable[..., Any], operator: Callable[..., Any]) -> Callable[..., Any]:
    """For calls inside an autograd.Function, where autograd does not record: `implementation` in plain eager mode, else
    `operator`. If a backward pass is itself recorded (create_graph=True), also `operator`, which raises that it has no
    second derivative; the result of `implementation` would be silently disconnected."""

    def call(*arguments: Any) -> Any:
        if not torch.is_grad_enabled() and is_plain_eager(*(a for a in arguments if isinstance(a, Tensor))):
            return implementation(*arguments)
        return operator(*arguments)

    return call


def eager_function(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The `apply` of an autograd.Function made of the three functions that `register_autograd` takes; where nothing is
    recorded `forward` alone, which takes a third of the host's time."""

    class EagerFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        return EagerFunction.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)

    return call
