"""Which implementation of an operator runs: the one asked for, or what measurements on this GPU architecture decide.

The measurements are the files in `measured` beside this module, written by `python -m benchmarks.plot` from benchmark
results: `<architecture>.json` is of the first device measured of an architecture, and applies to all of them;
`<architecture>-<device>.json` is of another device, for which it takes precedence. An architecture without a file has
not been measured, and there `auto` means the reference.
"""

import functools
import importlib.resources
import importlib.util
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Implementation = Literal["triton", "reference"]

SHAPE_KEYS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("rows", "width"),
    "rope": ("rows", "n_heads", "n_kv_heads", "head_dim"),
    "swiglu": ("rows", "width"),
    "cross_entropy": ("rows", "vocab"),
    "reemit": ("rows", "width", "ffn_width"),
}
"""The operators that have a switch, and the sizes that describe a call of each."""

SETTINGS = ("auto", "triton", "reference")

VARIANTS = ("residual carried", "residual not carried", "sequence sharded", "vocabulary sharded", "vocabulary whole")
"""What a cell may be restricted to: norms in a block that takes and returns a pair with the residual, or not; norms
between the collectives of tensor parallelism; the loss on a rank's slice of the vocabulary, or on all of it."""

# A measurement applies to shapes all of whose sizes are within this factor of its own.
REACH = 2.0
# It applies to more if its two times differ by more than the factor CLEAR, as those of a single kernel and of the dozen
# that plain PyTorch launches in eager mode do: no size reverses that.
CLEAR, CLEAR_REACH = 3.0, 16.0


@dataclass(frozen=True)
class Cell:
    """Forward and backward of one operator at one shape, both implementations timed alternately in one run.

    Eager cells time the operator alone. Compiled cells time the whole decoder block with and without the kernel, for
    operators that the compiler can fuse with their neighbours; benchmarks/contests.py lists them.
    """

    op: str
    compiled: bool
    shape: dict[str, int]
    triton_us: float
    reference_us: float
    """triton_us minus the difference, which was taken pass by pass."""
    noise_us: float
    """What the difference must exceed: twice its standard error, and at least 1% of the reference's time."""
    dtype: str = "bfloat16"
    variant: str = ""
    """One of VARIANTS if the operator has several forms, or its surroundings matter; empty: all."""

    @property
    def speedup(self) -> float:
        return self.reference_us / self.triton_us

    @property
    def reach(self) -> float:
        """The factor by which the sizes of a shape may differ from its own."""
        return CLEAR_REACH if max(self.speedup, 1 / self.speedup) > CLEAR else REACH

    @property
    def triton_wins(self) -> bool:
        """Whether the kernel is faster by more than the noise."""
        return self.reference_us - self.triton_us > self.noise_us


@dataclass(frozen=True)
class Table:
    """What was measured on one architecture, and with what."""

    architecture: str
    device: str
    versions: dict[str, str]
    commit: str
    cells: tuple[Cell, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "cells": tuple(Cell(**cell) for cell in fields["cells"])})


@dataclass(frozen=True)
class Choice:
    """`reason` is a fragment that ends a line such as `rms_norm: triton, 1.20x the reference at ...`."""

    implementation: Implementation
    reason: str


def current_device() -> str:
    """The current CUDA device's name, or ""."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def current_architecture() -> str | None:
    """`sm_90` and the like of the current CUDA device, the target's name on ROCm, None without a device."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def slug(name: str) -> str:
    """A name, like a device's, as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def table_name(architecture: str, device: str = "") -> str:
    """The name of the file with `device`'s own measurements, or the architecture's."""
    return "-".join(filter(None, (architecture, slug(device)))) + ".json"


@functools.cache
def load_table(architecture: str, device: str = "") -> Table | None:
    """The committed measurements of `architecture`, or those of `device` alone; None if there are none."""
    file = importlib.resources.files("titan_kernels") / "measured" / table_name(architecture, device)
    return Table.from_json(file.read_text()) if file.is_file() else None


def choose(
    op: str,
    setting: str,
    *,
    architecture: str | None,
    compiled: bool,
    interpreted: bool,
    shape: Mapping[str, int],
    dtype: str = "bfloat16",
    variants: Collection[str] = (),
    device: str = "",
    table: Table | None = None,
) -> Choice:
    """The implementation of `op` for one setting of its switch.

    op: a key of SHAPE_KEYS. setting: "auto", "triton" or "reference". architecture: `current_architecture()`, None if
    tensors are not on a GPU. compiled: whether the operator runs inside torch.compile. interpreted: whether Triton's
    interpreter is in use. shape: the sizes named by SHAPE_KEYS[op]. dtype: of activations, like "bfloat16". variants:
    those of VARIANTS that apply. device: torch's name of the GPU, whose own measurements are preferred to its
    architecture's. table: instead of the committed ones.

    Raises:
        ValueError: an unknown op or setting, sizes that do not fit the op, or "triton" where Triton cannot run.
    """
    _check(op, setting, shape)
    if setting == "reference":
        return Choice("reference", "asked for")
    installed = importlib.util.find_spec("triton") is not None
    if setting == "triton":
        if not installed:
            raise ValueError(f'{op} = "triton" needs the triton package, which is not installed; say "auto"')
        if architecture is None and not interpreted:
            raise ValueError(
                f'{op} = "triton" needs a GPU, and there is none; say "auto" or "reference", or set '
                "TRITON_INTERPRET=1 to run the kernel slowly on the CPU"
            )
        return Choice("triton", "asked for" if architecture else "asked for, through Triton's interpreter")
    if architecture is None:
        return Choice("reference", "no GPU")
    if not installed:
        return Choice("reference", "triton is not installed")
    own = load_table(architecture, device) if device and table is None else None
    if own is not None:
        choice, is_measured = _by_measurement(op, architecture, compiled, variants, dtype, shape, own)
        if is_measured:
            return choice
    return _by_measurement(op, architecture, compiled, variants, dtype, shape, table or load_table(architecture))[0]


def _check(op: str, setting: str, shape: Mapping[str, int]) -> None:
    if op not in SHAPE_KEYS:
        raise ValueError(f"no operator {op!r}; there are {', '.join(SHAPE_KEYS)}")
    if setting not in SETTINGS:
        raise ValueError(f'{op} = "{setting}" is none of {", ".join(SETTINGS)}')
    if set(shape) != set(SHAPE_KEYS[op]):
        raise ValueError(f"{op} is described by the sizes {', '.join(SHAPE_KEYS[op])}; got {', '.join(shape)}")
    if min(shape.values()) < 1:
        raise ValueError(f"{op}: every size must be positive, got {dict(shape)}")


def _by_measurement(
    op: str,
    architecture: str,
    compiled: bool,
    variants: Collection[str],
    dtype: str,
    shape: Mapping[str, int],
    table: Table | None,
) -> tuple[Choice, bool]:
    """The table's choice, and whether it has a measurement for this shape."""
    context = "compiled" if compiled else "in eager mode"
    if table is None:
        return Choice("reference", f"not measured on {architecture}"), False
    if table.architecture != architecture:
        raise ValueError(f"the table is of {table.architecture}, the device is {architecture}")
    cells = [cell for cell in table.cells if (cell.op, cell.compiled, cell.dtype) == (op, compiled, dtype)]
    cells = [cell for cell in cells if not cell.variant or cell.variant in variants]
    nearest = min(cells, key=lambda cell: _distance(cell, shape), default=None)
    if nearest is None:
        among = f" ({', '.join(variants)})" if variants else ""
        return Choice("reference", f"not measured {context} in {dtype} on {architecture}{among}"), False
    if nearest.variant:
        context += f" ({nearest.variant})"
    at = " x ".join(f"{name} {size}" for name, size in nearest.shape.items())
    if any(max(size / shape[name], shape[name] / size) > nearest.reach for name, size in nearest.shape.items()):
        return Choice("reference", f"not measured {context} on {architecture} near this shape (nearest: {at})"), False
    verdict = f"{nearest.speedup:.2f}x the reference {context} at {at} on {table.device}{_other_torch(table)}"
    return Choice("triton" if nearest.triton_wins else "reference", f"the kernel is {verdict}"), True


def _other_torch(table: Table) -> str:
    """With which torch it was measured, if with another release than this one: its compiler may have changed since."""
    measured = table.versions.get("torch", "")
    own, other = (version.split("+")[0].split(".")[:2] for version in (torch.__version__, measured))
    return f" with torch {'.'.join(other)}" if measured and other != own else ""


def _distance(cell: Cell, shape: Mapping[str, int]) -> float:
    return sum(abs(math.log(cell.shape[name] / shape[name])) for name in shape)
