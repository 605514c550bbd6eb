"""torch.compile: what is compiled, with which of Inductor's settings, and where its code is kept."""

import dataclasses
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.compiler.config
from torch import Tensor

from titan_fast import config
from titan_fast.errors import ConfigError, did_you_mean
from titan_fast.loss import LinearCrossEntropy
from titan_fast.model import Llama
from titan_fast.ops import REFERENCE, Ops, source_digest

_MOST_GRAPHS = 64
"""Of one function. AdamW's update has one for each shape of a weight, and as graphs must be whole, the next one after
dynamo's limit, which is 8, would end the run."""
_NEED = {"tvm": "tvm", "openxla": "torch_xla", "openxla_eval": "torch_xla"}


def check(settings: config.Compile, uses_fsdp: bool) -> None:
    """ConfigError for settings that contradict each other, or would do nothing."""
    if not settings.enable:
        return
    found = [name for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE") if os.environ.get(name) == "1"]
    if torch._dynamo.config.disable or found:
        raise ConfigError(
            f"compile.enable is True, and an environment variable ({' and '.join(found) or 'TORCH_COMPILE_DISABLE'}) "
            "turns torch.compile off",
            "unset it, or set compile.enable to False",
        )
    if settings.backend not in torch._dynamo.list_backends(None):
        known = sorted({*torch._dynamo.list_backends(), "aot_eager", "eager"} - _NEED.keys())
        raise ConfigError(
            f"torch {torch.__version__} has no compile.backend {settings.backend!r}",
            f"{did_you_mean(settings.backend, known)}known: {', '.join(known)}",
        )
    if (needs := _NEED.get(settings.backend)) and find_spec(needs) is None:
        what = f"compile.backend {settings.backend!r} needs the package {needs}"
        raise ConfigError(what, "install it, or use inductor")
    tuned = [name for name in ("coordinate_descent", "max_autotune") if getattr(settings, name)]
    if tuned and settings.backend != "inductor":
        raise ConfigError(
            f"compile.{tuned[0]} is a setting of Inductor, and compile.backend is {settings.backend!r}", "change one"
        )
    if "model" not in settings.components:
        return
    if others := sorted({"blocks", "norm", "loss"} & set(settings.components)):
        raise ConfigError(
            f"compile.components has model, which contains {' and '.join(others)}", "name one or the other"
        )
    if uses_fsdp:
        raise ConfigError(
            "compile.components has model, and FSDP2 gathers weights between blocks, within what would be one graph",
            "use blocks, or on a single device parallelism.single_device masters",
        )


def check_machine(settings: config.Compile, device: torch.device) -> None:
    """ConfigError where Inductor cannot work on this machine."""
    if not settings.enable or settings.backend != "inductor" or device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        raise ConfigError(
            "compile.enable on a CPU needs a C++ compiler, and none works",
            "install g++, name another in CXX, or set compile.enable to False",
        ) from error


def compiler(settings: config.Compile) -> Callable[[Any], Any]:
    """torch.compile as `[compile]` wants it: one graph, static shapes."""
    return lambda function: torch.compile(function, **arguments(settings))


def arguments(settings: config.Compile) -> dict[str, Any]:
    """The keyword arguments of torch.compile and Module.compile."""
    chosen: dict[str, Any] = {"backend": settings.backend, "fullgraph": True, "dynamic": False}
    options = {}
    if settings.coordinate_descent:
        options["coordinate_descent_tuning"] = True
    if settings.max_autotune:
        options["max_autotune"] = True
    return chosen | ({"options": options} if options else {})


def optimizer_compiler(settings: config.Compile) -> Callable[[Any], Any] | None:
    """What compiles the optimizer's update; None where it is not to be compiled."""
    return compiler(settings) if settings.takes("optimizer") else None


def compile_model(model: Llama, settings: config.Compile) -> None:
    """Compiles in place what `[compile] components` names of the model."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    if "model" in settings.components:
        if isinstance(model.head.loss, LinearCrossEntropy):
            ops = compiled_cross_entropy(model.head.loss.ops, lambda function: function)
            model.head.loss = dataclasses.replace(model.head.loss, ops=ops)
        model.compile(**arguments(settings))
    if "blocks" in settings.components:
        for block in model.blocks:  # all of one shape, so they share one graph
            block.compile(**arguments(settings))
    if "norm" in settings.components:
        model.norm.compile(**arguments(settings))
    if "loss" in settings.components and isinstance(model.head.loss, LinearCrossEntropy):
        ops = compiled_cross_entropy(model.head.loss.ops, compiler(settings))
        model.head.loss = dataclasses.replace(model.head.loss, ops=ops)


def name_code() -> None:
    """Lets no other version of our operators use the code that torch keeps from now on: in its keys an operator is a
    name, while the graph that is kept has its derivative as it was."""
    if (digest := source_digest()) not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag += digest


def keep_code(settings: config.Compile, tensor_degree: int) -> None:
    """Lets Inductor and Triton keep compiled code in `cache_folder`, if one is set; both find it through the
    environment. Wherever it is kept, other versions of our operators do not use it. To be called before anything is
    compiled."""
    if settings.enable:
        name_code()
    if settings.enable and tensor_degree == 1:
        # torch does not cache graphs that call private functions unless it is told that this is safe, and attention
        # calls these two, which name a backend and choose it. The choice depends on cuDNN's version, which therefore
        # goes into the key. With tensor parallelism the keys would not tell the ranks' graphs apart.
        inductor.unsafe_marked_cacheable_functions = {
            f"torch.nn.attention.{name}": f"cudnn {torch.backends.cudnn.version()}"
            for name in ("_backend_from_string", "_sdpa_kernel")
        }
    if not (settings.enable and settings.cache_folder):
        return
    folder = Path(settings.cache_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"compile.cache_folder cannot be made: {error.strerror}", "choose another folder", str(folder)
        ) from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.resolve() / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve() / "triton")


def compiled_cross_entropy(ops: Ops, compile_function: Callable[[Any], Any]) -> Ops:
    """`ops` with the reference's cross entropy replaced by a form that a compiler can fuse, passed through
    `compile_function`. Kernels that are not the reference's stay as they are."""
    changes = {}
    if ops.cross_entropy_with_grad_ is REFERENCE.cross_entropy_with_grad_:
        changes["cross_entropy_with_grad_"] = compile_function(cross_entropy_with_grad_)
    if ops.cross_entropy_stats is REFERENCE.cross_entropy_stats:
        changes["cross_entropy_stats"] = compile_function(REFERENCE.cross_entropy_stats)
    if ops.cross_entropy_grad_ is REFERENCE.cross_entropy_grad_:
        changes["cross_entropy_grad_"] = compile_function(cross_entropy_grad_)
    return dataclasses.replace(ops, **changes)


def cross_entropy_grad_(
    logits: Tensor,
    labels: Tensor,
    vocab_offset: int,
    logsumexp: Tensor,
    scale: Tensor,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> None:
    """titan_kernels.reference.cross_entropy_grad_ without its scatter, which a compiler cannot fuse, so that the
    gradient would be written in float32 and read again. Compiled, this reads the logits and writes the gradient, once
    each."""
    columns = torch.arange(logits.shape[-1], device=logits.device) + vocab_offset
    weight = torch.where(labels != ignore_index, scale, 0.0).to(logsumexp.dtype)[:, None]
    probability = torch.exp(logits.to(logsumexp.dtype) - logsumexp[:, None])
    gradient = probability * (1.0 + 2.0 * z_loss * logsumexp)[:, None]
    logits.copy_((gradient - (columns == labels[:, None]).to(gradient.dtype)) * weight)


def cross_entropy_with_grad_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """titan_kernels.reference.cross_entropy_with_grad_ in a form that a compiler can fuse into one kernel, which reads
    a row three times (its maximum; the sum and the target; the gradient) and writes it once."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logsumexp = torch.logsumexp(wide, -1)
    hit = torch.arange(logits.shape[-1], device=logits.device) == labels[:, None]
    target = torch.where(hit, wide, 0.0).sum(-1)
    loss = logsumexp - target
    if z_loss:
        loss = loss + z_loss * logsumexp**2
    cross_entropy_grad_(logits, labels, 0, logsumexp, scale, ignore_index, z_loss)
    return torch.where(labels != ignore_index, loss, 0.0)
