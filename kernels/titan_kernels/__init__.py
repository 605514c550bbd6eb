"""Triton kernels for pretraining Llama models, which need only torch and triton.

`titan_kernels.reference` has every operator in plain PyTorch, and works without triton.
"""

from importlib.util import find_spec

if find_spec("triton") is not None:
    # Modules are named after their operators, which are bound here and not lazily, so that `titan_kernels.rms_norm` is
    # always the operator, whatever was imported first.
    from titan_kernels.cross_entropy import (
        cross_entropy,
        cross_entropy_grad_,
        cross_entropy_stats,
        cross_entropy_with_grad_,
    )
    from titan_kernels.reemit import norm_linear, swiglu_linear
    from titan_kernels.rms_norm import add_rms_norm, rms_norm
    from titan_kernels.rope import rope
    from titan_kernels.swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "cross_entropy_grad_",
    "cross_entropy_stats",
    "cross_entropy_with_grad_",
    "norm_linear",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_linear",
]
