"""The short way through eager mode: around the dispatcher where nothing is there that wants to see the operator.

A call of a `torch.library.custom_op` costs about 20 us of host time more than an autograd.Function that runs the same
code. Compilation, DTensor and the dispatch modes (selective checkpointing, FLOP counting, fake tensors) need the
operator; plain eager training does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# Private, so they may go away: then every call takes the dispatcher's way, which is only slower.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms: Callable[[], Any] = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", tuple)


def is_plain_eager(*tensors: Tensor) -> bool:
    """Whether a call on these tensors is seen by no compiler, dispatch mode, torch.func transform or subclass.

    NotImplementedError where forward-mode derivatives are taken, to which an operator would be a constant without a
    word; compiled it still is.
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
    `operator`; and `operator` where a backward pass is itself recorded (create_graph=True): it has no second derivative
    and raises that, where the implementation would leave the result silently disconnected."""

    def call(*arguments: Any) -> Any:
        if not torch.is_grad_enabled() and is_plain_eager(*(a for a in arguments if isinstance(a, Tensor))):
            return implementation(*arguments)
        return operator(*arguments)

    return call


def eager_function(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """An autograd.Function from the three functions that `register_autograd` takes; its `apply`."""

    class EagerFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    return EagerFunction.apply
