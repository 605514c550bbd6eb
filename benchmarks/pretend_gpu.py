"""Makes this process believe that it has an H100, so that Inductor generates the code for one.

Nothing can be run, and it cannot be undone, so use a separate process, with TRITON_INTERPRET unset. Private functions
of torch are replaced, so this is tied to the versions in TESTED_TORCH.
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.device_interface
import torch._dynamo.utils
import torch._functorch.aot_autograd
import torch._inductor.config as inductor_config
import torch._inductor.graph
import torch._subclasses.fake_tensor as fake_tensor
import torch.cuda.random
import triton
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.fx_passes import joint_graph
from torch._inductor.utils import BoxedBool
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

TESTED_TORCH = ("2.11", "2.13")

# torch.cuda.get_device_properties of an H100 SXM.
_PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    is_integrated=False,
    is_multi_gpu_board=False,
    gcnArchName="",
    uuid="",
    pci_bus_id=0,
)


class _Driver:
    """Triton's view of the device."""

    binary_ext = "cubin"
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return (9, 0)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class _NoGuard:
    """In place of the context managers that switch devices."""

    def __init__(self, *args: Any) -> None:
        pass

    def __enter__(self) -> "_NoGuard":
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def override(owner: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module or class, whatever its declared type."""
    setattr(owner, name, value)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@contextlib.contextmanager
def _keep_random_state() -> Iterator[None]:
    yield


def install() -> None:
    """Replaces what torch, Dynamo, Inductor and Triton ask about the device, for the rest of the process."""
    _install_torch()
    _install_compiler()
    inductor_config.fx_graph_cache = False
    inductor_config.compile_threads = 1
    inductor_config.benchmark_kernel = True  # writes each kernel's bytes into its metadata


def _install_torch() -> None:
    stream = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": _PROPERTIES,
        "get_device_capability": (9, 0),
        "get_device_name": _PROPERTIES.name,
        "is_bf16_supported": True,
        "current_stream": stream,
        "synchronize": None,
        "_lazy_init": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _always(value))
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    for name in ("device", "_DeviceGuard"):
        setattr(torch.cuda, name, _NoGuard)
    for name in ("_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, _always(0))
    override(torch._C, "_cuda_setDevice", _always(None))  # a CPU build has none to replace


def _install_compiler() -> None:
    override(fake_tensor, "init_gpu_context", _always(None))
    # Its patterns (attention in parts, padded matrix products) build CUDA tensors; a Llama block has neither.
    override(joint_graph, "lazy_init", _always(None))
    for module in (torch._dynamo.utils, torch._functorch.aot_autograd):
        override(module, "preserve_rng_state", _keep_random_state)
    interface = torch._dynamo.device_interface.CudaInterface
    answers = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "get_device_properties": _PROPERTIES,
        "is_bf16_supported": True,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_raw_stream": 0,
    }
    for name, value in answers.items():
        setattr(interface, name, staticmethod(_always(value)))
    override(interface, "device", _NoGuard)
    override(interface.Worker, "get_device_properties", staticmethod(_always(_PROPERTIES)))
    override(interface.Worker, "current_device", staticmethod(_always(0)))
    triton.runtime.driver.set_active(_Driver())  # type: ignore[arg-type]


class _Generated(Exception):
    """Carries the source out of Inductor before it is loaded onto the device."""

    def __init__(self, source: str) -> None:
        self.source = source


def _stop_after_codegen(graph: Any) -> Any:
    code, _ = graph.codegen()
    raise _Generated(code.value if hasattr(code, "value") else code)


def generate(graph: GraphModule, mode: fake_tensor.FakeTensorMode, is_backward: bool) -> str:
    """The module that Inductor generates for an ATen graph, which was traced with CPU tensors and is moved to `cuda:0`.

    mode: a new fake mode. Raises whatever Inductor raises if it fails before there is code.
    """
    inputs = _move_to_cuda(graph, mode)
    lowering = torch._inductor.graph.GraphLowering
    original = lowering.compile_to_module
    vars_before = {name: getattr(lowering, name) for name in ("compile_to_module", "_compile_to_module")}
    for name in vars_before:
        setattr(lowering, name, _stop_after_codegen)
    try:
        compile_fx_inner(
            graph, inputs, is_backward=is_backward, static_input_idxs=(), graph_id=0, cudagraphs=BoxedBool(False)
        )
    except _Generated as generated:
        return generated.source
    except Exception as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, _Generated):
            inner = inner.__cause__ or inner.__context__ or getattr(inner, "inner_exception", None)
        if inner is None:
            raise
        return inner.source
    finally:
        for name, function in vars_before.items():
            setattr(lowering, name, function)
    raise RuntimeError(f"Inductor returned without generating code through {original}")


def _move_to_cuda(graph: GraphModule, mode: fake_tensor.FakeTensorMode) -> list[Any]:
    inputs: list[Any] = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor):
            with mode:
                inputs.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda"))
        elif node.op == "placeholder":
            inputs.append(value)
        elif node.op == "call_function" and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
    return inputs
