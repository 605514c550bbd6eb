"""On a machine with a GPU, tests that take `device` are GPU tests: `-m gpu` runs the same numerics on CUDA.

Without one they run on the CPU in Triton's interpreter, which tests/conftest.py enables, and are not marked.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise pytest.UsageError("TRITON_INTERPRET is set: the kernels would be interpreted, not run by the GPU; unset it")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unwritten_elements_are_nan() -> Iterator[None]:
    """Fills tensors from `torch.empty`: elements that a kernel does not write could otherwise be right by chance, if a
    correct result was in the same memory before. Not without PyTorch's cache, which is for compute-sanitizer, whose
    initcheck notices unwritten elements by itself."""
    before = torch.get_deterministic_debug_mode()
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def multiply_adds_round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; the interpreter would round the product too."""
    if find_spec("triton") is None:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
