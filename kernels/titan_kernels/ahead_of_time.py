"""Compile one kernel launch for an NVIDIA architecture without a GPU, and read from the result what it will cost.

Registers and stack come from the `cuobjdump` that Triton brings; loads, stores and arithmetic types from the PTX.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titan_kernels.launch import Launch

REGISTER_FILE = 65536  # 32-bit registers per multiprocessor, all three parts
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, table of technical
specifications)."""

WIDE_SHARE = 0.5
"""Below this share, too much goes in narrow accesses. Statistics, labels and table entries are narrow of necessity."""

_ACCESS = re.compile(r"\b(ld|st)\.global((?:\.\w+(?:::\w+)*)*)")
_COPY_TO_SHARED = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\],\s*(\w+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Cost:
    """What one compiled launch uses. The shares are of the bytes that a thread's global loads and stores move as they
    stand in the PTX text, loops counted once: those that go in pieces of 128 bits or more. 1.0 where there are none."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    wide_load_share: float
    wide_store_share: float
    double_precision: bool

    def violations(self, architecture: int, allow_narrow_stores: bool = False) -> list[str]:
        """What no launch of this package may do, in words; empty for a sound one."""
        found = []
        if self.stack_bytes:
            found.append(f"spills {self.stack_bytes} bytes per thread to the stack")
        if self.registers * self.threads > REGISTER_FILE:
            found.append(f"{self.registers} registers x {self.threads} threads exceed the file of {REGISTER_FILE}")
        if self.shared_bytes > SHARED_MEMORY[architecture]:
            found.append(f"{self.shared_bytes} bytes of shared memory exceed {SHARED_MEMORY[architecture]}")
        if self.wide_load_share < WIDE_SHARE:
            found.append(f"only {self.wide_load_share:.0%} of the loaded bytes in 128-bit loads")
        if self.wide_store_share < WIDE_SHARE and not allow_narrow_stores:
            found.append(f"only {self.wide_store_share:.0%} of the stored bytes in 128-bit stores")
        if self.double_precision:
            found.append("arithmetic in double precision")
        return found


def compile_launch(launch: Launch, architecture: int) -> Cost:
    """The cost of `launch` on compute capability `architecture` (80, 90 or 100).

    Raises:
        ValueError: Triton runs its interpreter, which has nothing to compile, or the architecture is not known here.
    """
    if architecture not in SHARED_MEMORY:
        raise ValueError(f"architecture {architecture} is none of {', '.join(map(str, SHARED_MEMORY))}")
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ValueError("the kernels were defined for Triton's interpreter; unset TRITON_INTERPRET")
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(_source(launch), target=target, options=options)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, stack = _resources(cubin)
    return Cost(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        threads=32 * launch.num_warps,
        wide_load_share=_wide_share(_widths(ptx, "ld") + _copy_widths(ptx)),
        wide_store_share=_wide_share(_widths(ptx, "st")),
        double_precision=".f64" in ptx,
    )


def _source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    signature = {name: "constexpr" if name in launch.constexprs else launch.signature[name] for name in names}
    constexprs: dict[Any, Any] = {(names.index(name),): value for name, value in launch.constexprs.items()}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, stack bytes per thread) of a cubin with one kernel."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _RESOURCES.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, _, local = (int(group) for group in found.groups())
    return registers, stack + local


def _widths(ptx: str, kind: str) -> list[int]:
    """Bits that each global load ("ld") or store ("st") instruction of the text moves per thread."""
    widths = []
    for found in _ACCESS.finditer(ptx):
        if found[1] != kind:
            continue
        modifiers = found[2].split(".")
        bits = int(re.sub(r"\D", "", modifiers[-1]))
        vector = next((int(modifier[1:]) for modifier in modifiers if re.fullmatch(r"v\d", modifier)), 1)
        widths.append(vector * bits)
    return widths


def _copy_widths(ptx: str) -> list[int]:
    """Bits that each asynchronous copy from global to shared memory, the other kind of load, moves per thread."""
    return [8 * int(size, 0) for size in _COPY_TO_SHARED.findall(ptx)]


def _wide_share(widths: list[int]) -> float:
    return sum(width for width in widths if width >= 128) / sum(widths) if widths else 1.0
