"""Triton kernels for pretraining Llama models: torch and triton are all they need.

`titan_kernels.reference` has every operator in plain PyTorch, and works where triton is not installed.
"""

from importlib.util import find_spec

if find_spec("triton") is not None:
    # The modules bear the names of their operators: what `titan_kernels.rms_norm` means must not depend on which was
    # asked for first, so the operators are bound here rather than when they are first wanted.
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
