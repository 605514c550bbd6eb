"""The only door to the kernels: for each operator the reference or Triton, chosen once, when the model is built."""

import dataclasses
import functools
import hashlib
import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import titan_kernels
import torch
import torch.nn.functional as F
from titan_kernels import reference, validation
from titan_kernels.choice import Choice, choose, current_architecture, current_device
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_fast import documents, float8, wide_products
from titan_fast.config import Kernels
from titan_fast.documents import Attention
from titan_fast.errors import ConfigError
from titan_fast.flavors import ModelShape

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_FLASH_VERSIONS = {"fa3": "FA3", "fa4": "FA4"}
_FLASH_PACKAGES = {"fa3": "flash_attn_3", "fa4": "flash-attn-4==4.0.0b18"}
"""torch 2.11 and 2.13 cannot call a newer FlashAttention 4, whose functions return more than two values."""


def linear(x: Tensor, weight: Tensor, port: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in] -> [..., out]. With a `port` [out, in] the weight's gradient goes there, in its
    dtype; see wide_gradients.py."""
    return F.linear(x, weight) if port is None else wide_products.linear(x, weight, port)


def source_digest() -> str:
    """sha256 of the code of all our operators, with their derivatives."""
    files = (*sorted(Path(titan_kernels.__file__).parent.glob("*.py")), Path(wide_products.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass(frozen=True)
class Ops:
    """The operators that a model is built on; shapes and formulas are in titan_kernels.reference."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    cross_entropy_with_grad_: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    cross_entropy_stats: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    cross_entropy_grad_: Callable[[Tensor, Tensor, int, Tensor, Tensor, int, float], None]
    attention: Attention
    norm_linear: Callable[..., tuple[Tensor, ...]] | None = None
    """Norm and the matrices after it as one unit, which saves no normalised activation; None: as separate operators."""
    swiglu_linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """The same for SwiGLU and the down projection."""
    linear: Callable[..., Tensor] = linear
    """A block's matrix product, with the arguments of `linear`."""
    carry_residual: bool = False
    reasons: tuple[tuple[str, str, str], ...] = ()
    """(operator, choice, reason) for the log."""


@dataclass(frozen=True)
class Workload:
    """What one device computes in a pass, as far as the choice of kernels depends on it."""

    shape: ModelShape
    tokens: int
    """Sequences x their length."""
    tensor_degree: int
    loss_chunk: int
    compiled: bool
    """Whether decoder blocks are compiled."""
    loss_compiled: bool = False
    """Whether the loss on a chunk of logits is compiled."""
    dtype: str = "bfloat16"
    """Of activations on a GPU; only there are kernels chosen by measurement."""
    pointwise: bool = False
    """Whether blocks recompute everything but matrix products and attention."""
    float8: str | None = None
    """The recipe by which blocks multiply in float8; None: they do not."""
    wide_gradients: bool = False
    """Whether blocks' products write weight gradients in float32."""
    document_mask: bool = False
    """Whether attention stays within documents."""
    carries_residual: bool = False
    """Whether blocks on a GPU pass the residual on where `kernels.carry_residual` is None."""

    def sizes(self) -> dict[str, dict[str, int]]:
        """The sizes of a call, for each operator with a switch."""
        shape, degree = self.shape, self.tensor_degree
        rows = max(1, self.tokens // degree)  # norms see this rank's part of each sequence
        chunk = min(self.loss_chunk or self.tokens, self.tokens)
        return {
            "rms_norm": {"rows": rows, "width": shape.dim},
            "rope": {
                "rows": self.tokens,
                "n_heads": shape.n_heads // degree,
                "n_kv_heads": shape.n_kv_heads // degree,
                "head_dim": shape.head_dim,
            },
            "swiglu": {"rows": self.tokens, "width": shape.ffn_dim // degree},
            "cross_entropy": {"rows": chunk, "vocab": -(-shape.vocab_size // degree)},
            "reemit": {"rows": rows, "width": shape.dim, "ffn_width": shape.ffn_dim // degree},
        }


def attention_with(backends: list[SDPBackend]) -> Attention:
    """Causal scaled dot-product attention by the first of `backends` that accepts the inputs.

    The function takes q [B, H, S, E], k and v [B, K, T, E] and returns [B, H, S, E]. With S == T it is causal; with
    S == 1 (one new token against a cache) everything is visible. Within documents it is computed with a mask, so that
    what lies between them is computed too.
    """
    # cuDNN makes a plan for every length of k, which takes longer than everything else for a new token.
    for_one_token = [backend for backend in backends if backend != SDPBackend.CUDNN_ATTENTION] or backends

    def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> Tensor:
        causal = q.shape[2] > 1
        assert not causal or q.shape[2] == k.shape[2], "a prompt is read in one piece"
        grouped = q.shape[1] != k.shape[1]
        if bounds is not None:
            mask = documents.visible(bounds, q.shape[0], q.shape[2])
            with sdpa_kernel(backends, set_priority=True):
                return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
        with sdpa_kernel(backends if causal else for_one_token, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return attention


def with_equal_heads(attention: Attention) -> Attention:
    """`attention`, but each head of k and v, [B, K, T, E], is repeated for the heads of q that share it."""

    def repeated(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> Tensor:
        times = q.shape[1] // k.shape[1]
        if times > 1:
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        return attention(q, k, v, bounds)

    return repeated


def activate_flash(version: str, group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Makes FlashAttention 3 or 4 ("fa3", "fa4") torch's flash backend for the whole process, and tries it with `group`
    heads of q for one of k and v. ConfigError where it is not installed, or where torch and the package do not fit
    together (torch passes its arguments by position, and packages change); then the backend is torch's own again."""
    attention = importlib.import_module("torch.nn.attention")
    try:
        attention.activate_flash_attention_impl(_FLASH_VERSIONS[version])
        _try_flash(version, group, head_dim, dtype, device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, not of the package
        raise
    except Exception as error:
        if attention.current_flash_attention_impl() is not None:
            attention.restore_flash_attention_impl()
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"kernels.attention {version!r} is not available with torch {torch.__version__}: {first}",
            f"install {_FLASH_PACKAGES[version]}, or use auto",
        ) from error


@functools.cache  # kernels are chosen more than once
def _try_flash(
    version: str, group: int, head_dim: int, dtype: torch.dtype, device: torch.device, document_mask: bool = False
) -> None:
    """Tries one call and its gradients; a run needs these kernels compiled anyway. document_mask: within two documents.
    RuntimeError where the results differ from plain attention's by more than bfloat16's rounding."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, 256, head_dim, generator=generator, device=device).to(dtype)

    flash, plain = attention_with([_BACKENDS[version]]), attention_with([SDPBackend.MATH])
    bounds = documents.split_in_two(1, 256, device) if document_mask else None
    if document_mask:
        flash = documents.with_flash(flash)
    q, k, v, gradient = normal(group), normal(1), normal(1), normal(group)
    results = []
    # The package restores the current device at its end; if that were another device, it would take memory there.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for wide, attention in ((dtype, flash), (torch.float32, plain)):
            inputs = [x.to(wide, copy=True).requires_grad_() for x in (q, k, v)]
            out = attention(*inputs, bounds)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, gradient.to(wide))])
    for name, ours, exact in zip(("result", "dq", "dk", "dv"), *results, strict=True):
        error = float((ours.float() - exact).norm() / exact.norm())
        if not error < 0.02:
            raise RuntimeError(f"its {name} is off by {error:.1%}")


def _choose_for_documents(setting: str, device: torch.device, workload: Workload) -> tuple[str, str]:
    """(choice, reason) of what computes attention within documents on a GPU."""
    documents.check(setting, workload.dtype)
    version, shape = "flash" if setting == "auto" else setting, workload.shape
    sizes = shape.n_heads // shape.n_kv_heads, shape.head_dim, getattr(torch, workload.dtype), device
    try:
        _try_flash(version, *sizes, document_mask=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, not of the kernels
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"attention within documents does not work with torch {torch.__version__} and {version} here: {first}",
            "turn training.document_mask off" + (", or use kernels.attention flash" if version != "flash" else ""),
        ) from error
    return version, "within documents" + (", as configured" if setting != "auto" else "")


def _must_be_deterministic() -> bool:
    """Whether operators without a deterministic algorithm are refused, as with `debug.deterministic`. Then torch leaves
    cuDNN's attention out, silently if there is another."""
    return torch.get_deterministic_debug_mode() == 2


def _choose_attention(
    setting: str, device: torch.device, dtype: str, shape: ModelShape
) -> tuple[list[SDPBackend], str, str]:
    """(backends in order, choice, reason) for activations of `dtype`, not within documents."""
    if setting != "auto":
        if setting in ("cudnn", "efficient", *_FLASH_VERSIONS) and device.type != "cuda":
            raise ConfigError(
                f"kernels.attention {setting!r} exists on CUDA only and this device is {device.type}",
                "use auto, flash or math",
            )
        if dtype == "float32" and device.type == "cuda" and setting not in ("efficient", "math"):
            raise ConfigError(
                f"kernels.attention {setting!r} takes no float32 on CUDA, in which this run computes",
                "use auto, efficient or math, or --training.mixed_precision_param bfloat16",
            )
        if setting == "cudnn" and _must_be_deterministic():
            raise ConfigError(
                "kernels.attention 'cudnn' has no deterministic backward pass in torch; debug.deterministic wants one",
                "use auto or flash, or turn debug.deterministic off",
            )
        if setting in _FLASH_VERSIONS:
            group = shape.n_heads // shape.n_kv_heads
            activate_flash(setting, group, shape.head_dim, getattr(torch, dtype), device)
        return [_BACKENDS[setting]], setting, "as configured"
    if device.type != "cuda":
        return [_BACKENDS["flash"], _BACKENDS["math"]], "flash", "torch's fused CPU attention"
    if dtype == "float32":
        return [_BACKENDS["efficient"], _BACKENDS["math"]], "efficient", "the fused one that takes float32"
    if _must_be_deterministic():
        return [_BACKENDS[name] for name in ("flash", "efficient", "math")], "flash", "debug.deterministic: not cuDNN's"
    if torch.cuda.get_device_capability(device) >= (9, 0):
        order = ["cudnn", "flash", "efficient", "math"]
        reason = "1.4 to 1.9 times as fast as flash on an H100"
        if torch.cuda.get_device_capability(device) > (9, 0):
            reason = "faster than flash on newer GPUs than Hopper by published figures; not measured here"
    else:
        order = ["flash", "cudnn", "efficient", "math"]
        reason = "faster than cuDNN before Hopper by published figures; not measured here"
    return [_BACKENDS[name] for name in order], order[0], reason


REFERENCE = Ops(
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rope=reference.rope,
    swiglu=reference.swiglu,
    cross_entropy_with_grad_=reference.cross_entropy_with_grad_,
    cross_entropy_stats=reference.cross_entropy_stats,
    cross_entropy_grad_=reference.cross_entropy_grad_,
    attention=attention_with([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]),
)

# The functions that each switch of [kernels] replaces; they have the same names in titan_kernels and in Ops.
_FUNCTIONS = {
    "rms_norm": ("rms_norm", "add_rms_norm"),
    "rope": ("rope",),
    "swiglu": ("swiglu",),
    "cross_entropy": ("cross_entropy_with_grad_", "cross_entropy_stats", "cross_entropy_grad_"),
    "reemit": ("norm_linear", "swiglu_linear"),
}


def check(kernels: Kernels, tensor_degree: int) -> None:
    """ConfigError for what cannot work on any device."""
    if kernels.reemit == "triton" and tensor_degree > 1:
        raise ConfigError(
            f"kernels.reemit 'triton' joins a norm to the matrix after it, and tensor_parallel_degree "
            f"{tensor_degree} puts a gather between them",
            "use reemit reference, or no tensor parallelism",
        )


def build_ops(kernels: Kernels, device: torch.device, workload: Workload, architecture: str | None = None) -> Ops:
    """The operators that `[kernels]` asks for on this device, with the reason for each choice. `architecture`
    ("sm_90"): the GPU to choose for, where tensors are fake and the GPU is not in this machine.

    Raises ConfigError where "triton" or an attention backend was asked for and cannot run here."""
    check(kernels, workload.tensor_degree)
    gpu = ""
    if architecture is None and device.type == "cuda":
        architecture, gpu = current_architecture(), current_device()
    backends, attention, why = _choose_attention(kernels.attention, device, workload.dtype, workload.shape)
    packed = workload.document_mask and device.type == "cuda"
    if packed:
        attention, why = _choose_for_documents(kernels.attention, device, workload)
    elif workload.document_mask:
        why += ", within documents"
    carries, why_carried = kernels.carry_residual, "as configured"
    if carries is None:
        carries = architecture is not None and workload.carries_residual
        why_carried = "0.9% faster by an H100's step with the 8B" if carries else "see kernels.carry_residual"
    chosen: dict[str, Any] = {"attention": attention_with(backends), "carry_residual": carries}
    if attention == "efficient":  # torch's efficient attention does not support grouped heads
        chosen["attention"] = with_equal_heads(chosen["attention"])
    if packed:
        chosen["attention"] = documents.with_flash(chosen["attention"])
    reasons = [("attention", attention, why), ("residual", "carried" if carries else "added", why_carried)]
    if workload.float8 is not None:
        chosen["linear"] = float8.linear_with(workload.float8)
        reasons.append(("linear", f"float8, {workload.float8}", "as configured; the head's product is not"))
    for operator, sizes in workload.sizes().items():
        choice = _choose_kernel(operator, kernels, architecture, gpu, workload, sizes, carries)
        if operator == "reemit" and workload.tensor_degree > 1:
            choice = Choice("reference", "not with tensor parallelism")
        elif operator == "reemit" and workload.pointwise and kernels.reemit == "auto":
            choice = Choice("reference", "pointwise recomputation saves as much")
        elif operator == "reemit" and workload.float8 is not None:
            choice = Choice("reference", "its products are not float8")
        elif operator == "reemit" and workload.wide_gradients and choice.implementation == "triton":
            choice = Choice("reference", "its products do not write gradients in float32")
        reasons.append((operator, choice.implementation, choice.reason))
        if choice.implementation == "triton":
            chosen |= {name: getattr(titan_kernels, name) for name in _FUNCTIONS[operator]}
            if operator == "reemit":
                unused = "not called: reemit's units have a SwiGLU of their own"
                reasons = [(name, picked, unused if name == "swiglu" else why) for name, picked, why in reasons]
    return dataclasses.replace(REFERENCE, **chosen, reasons=tuple(reasons))


def _variants(workload: Workload, carries_residual: bool) -> tuple[str, ...]:
    """Which measurements of norms and loss apply to this run, in the words of titan_kernels.choice."""
    if workload.tensor_degree > 1:
        return "sequence sharded", "vocabulary sharded"
    return "residual carried" if carries_residual else "residual not carried", "vocabulary whole"


def kernels_on_any_device() -> AbstractContextManager[Any]:
    """Inside, kernels can be traced on the CPU, where nothing runs them. They refuse CPU tensors that are not fake, and
    to the compiler's tracing no tensor looks fake."""
    return mock.patch.object(validation, "is_interpreted", lambda kernel: True)


def _choose_kernel(
    operator: str,
    kernels: Kernels,
    architecture: str | None,
    gpu: str,
    workload: Workload,
    sizes: dict[str, int],
    carries_residual: bool,
) -> Choice:
    dtype = workload.dtype
    if workload.float8 is not None and workload.compiled and operator != "cross_entropy":
        # The compiler fuses float8's casts with the reference, so measurements without float8 do not apply.
        dtype += " beside float8"
    try:
        return choose(
            operator,
            getattr(kernels, operator),
            architecture=architecture,
            compiled=workload.loss_compiled if operator == "cross_entropy" else workload.compiled,
            interpreted=os.environ.get("TRITON_INTERPRET") == "1",
            shape=sizes,
            dtype=dtype,
            variants=_variants(workload, carries_residual),
            device=gpu,
        )
    except ValueError as error:
        raise ConfigError(f"kernels.{error}", "change [kernels]") from error
