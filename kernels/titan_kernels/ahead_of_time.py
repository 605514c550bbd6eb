"""Compile a kernel launch for an NVIDIA architecture without a GPU, and determine its cost from the result.

Registers and stack are from Triton's own `cuobjdump`, loads, stores and arithmetic types from the PTX.
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

from titan_kernels.launch import MAX_BLOCKS, Launch

REGISTER_FILE = 65536  # 32-bit registers per multiprocessor, on all three architectures
MAX_THREADS = 2048  # resident at once on a multiprocessor, on all three architectures
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, table of technical
specifications). A multiprocessor has 1 KiB more, and reserves 1 KiB for each block."""
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
CACHE = {80: 40 << 20, 90: 50 << 20, 100: 126 << 20}
"""Bytes of level-2 cache of an A100, an H100 SXM and a B200 (NVIDIA's tuning guides for the three architectures)."""

WIDE_SHARE = 0.7
"""A lower share means too many narrow accesses. Statistics, labels and table entries are necessarily narrow."""

_ACCESS = re.compile(r"\b(ld|st)\.global((?:\.\w+(?:::\w+)*)*)([^;]*)")
_COPY_TO_SHARED = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\],\s*(\w+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Cost:
    """What one compiled launch uses. The shares are the fractions of the bytes in a thread's global loads and stores
    that are accessed 128 bits or more at a time. Instructions in the PTX text are counted, so loops and loads of the
    same address count once. 1.0 if there are none."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    wide_load_share: float
    wide_store_share: float
    double_precision: bool
    bytes_read_twice: int = 0
    """By one block. This and the next are as in `Launch`."""
    max_resident: int = MAX_BLOCKS

    def resident_blocks(self, architecture: int) -> int:
        """How many blocks a multiprocessor holds at once. Registers are allocated in units of 8 per thread."""
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = (SHARED_MEMORY[architecture] + 1024) // (self.shared_bytes + 1024)
        return min(REGISTER_FILE // registers, MAX_THREADS // self.threads, self.max_resident, shared)

    def cached_bytes(self, architecture: int) -> int:
        """The bytes that the level-2 cache must hold for every second read on a fully occupied device to hit it."""
        return MULTIPROCESSORS[architecture] * self.resident_blocks(architecture) * self.bytes_read_twice

    def violations(
        self,
        architecture: int,
        least_wide_loads: float = WIDE_SHARE,
        least_wide_stores: float = WIDE_SHARE,
        allow_uncached: bool = False,
    ) -> list[str]:
        """The rules of this package that this launch breaks, in words; empty if it breaks none."""
        found = []
        if self.stack_bytes:
            found.append(f"spills {self.stack_bytes} bytes per thread to the stack")
        if self.registers * self.threads > REGISTER_FILE:
            found.append(f"{self.registers} registers x {self.threads} threads exceed the file of {REGISTER_FILE}")
        if self.shared_bytes > SHARED_MEMORY[architecture]:
            found.append(f"{self.shared_bytes} bytes of shared memory exceed {SHARED_MEMORY[architecture]}")
        if self.wide_load_share < least_wide_loads:
            found.append(f"only {self.wide_load_share:.0%} of the loaded bytes in 128-bit loads")
        if self.wide_store_share < least_wide_stores:
            found.append(f"only {self.wide_store_share:.0%} of the stored bytes in 128-bit stores")
        if self.cached_bytes(architecture) > CACHE[architecture] and not allow_uncached:
            found.append(
                f"reads {self.cached_bytes(architecture) / 1e6:.0f} MB twice at a time, more than the cache's "
                f"{CACHE[architecture] / 1e6:.0f} MB"
            )
        if self.double_precision:
            found.append("arithmetic in double precision")
        return found


def compile_launch(launch: Launch, architecture: int) -> Cost:
    """The cost of `launch` on compute capability `architecture` (80, 90 or 100).

    Raises:
        ValueError: Triton's interpreter is in use, which compiles nothing, or the architecture is unknown.
    """
    if architecture not in SHARED_MEMORY:
        raise ValueError(f"architecture {architecture} is none of {', '.join(map(str, SHARED_MEMORY))}")
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ValueError("the kernels were defined for Triton's interpreter; unset TRITON_INTERPRET")
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(_source(launch), target=target, options=launch.options)
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
        bytes_read_twice=launch.bytes_read_twice,
        max_resident=launch.max_resident,
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
    """Bits per thread of each global load ("ld") or store ("st") instruction in the text."""
    widths, loaded = [], set()
    for found in _ACCESS.finditer(ptx):
        if found[1] != kind:
            continue
        # A tensor of one column is loaded once for each column of the tensor beside it, always from the same address.
        if kind == "ld" and (address := found[3].rpartition("[")[2]) in loaded:
            continue
        if kind == "ld":
            loaded.add(address)
        modifiers = found[2].split(".")
        bits = int(re.sub(r"\D", "", modifiers[-1]))
        vector = next((int(modifier[1:]) for modifier in modifiers if re.fullmatch(r"v\d", modifier)), 1)
        widths.append(vector * bits)
    return widths


def _copy_widths(ptx: str) -> list[int]:
    """Bits per thread of each asynchronous copy from global to shared memory, the other kind of load."""
    return [8 * int(size, 0) for size in _COPY_TO_SHARED.findall(ptx)]


def _wide_share(widths: list[int]) -> float:
    return sum(width for width in widths if width >= 128) / sum(widths) if widths else 1.0
