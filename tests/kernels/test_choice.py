"""`choose` with a made-up table."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from titan_kernels import choice
from titan_kernels.choice import Cell, Choice, Table, choose

pytest.importorskip("triton", reason="triton is not installed")

CELLS = (
    Cell("rms_norm", True, {"rows": 8192, "width": 4096}, triton_us=100.0, reference_us=95.0, noise_us=1.0),
    Cell("rms_norm", True, {"rows": 8192, "width": 8192}, triton_us=100.0, reference_us=180.0, noise_us=1.0),
    Cell("rms_norm", False, {"rows": 8192, "width": 4096}, triton_us=100.0, reference_us=400.0, noise_us=1.0),
    Cell("rms_norm", True, {"rows": 1024, "width": 8192}, 100.0, 150.0, 1.0, variant="sequence sharded"),
    Cell("rms_norm", True, {"rows": 8192, "width": 16384}, 100.0, 90.0, 1.0, variant="residual carried"),
    Cell("rms_norm", True, {"rows": 8192, "width": 16384}, 100.0, 120.0, 1.0, variant="residual not carried"),
    Cell("rms_norm", True, {"rows": 8192, "width": 4096}, 100.0, 300.0, 1.0, dtype="float32"),
    Cell("swiglu", True, {"rows": 8192, "width": 14336}, triton_us=99.0, reference_us=100.0, noise_us=2.0),
)
TABLE = Table("sm_99", "Example GPU", {"torch": torch.__version__}, "0000000", CELLS)
HERE: dict[str, Any] = {"architecture": "sm_99", "compiled": True, "interpreted": False, "table": TABLE}


def norm(setting: str = "auto", rows: int = 8192, width: int = 8192, **changes: Any) -> Choice:
    return choose("rms_norm", setting, shape={"rows": rows, "width": width}, **{**HERE, **changes})


def test_auto_follows_the_nearest_measured_shape() -> None:
    assert norm() == Choice(
        "triton", "the kernel is 1.80x the reference compiled at rows 8192 x width 8192 on Example GPU"
    )
    assert norm(width=4096).implementation == "reference"
    assert "0.95x" in norm(width=4096).reason
    assert norm(rows=12000, width=7168).implementation == "triton"
    assert norm(width=5120).implementation == "reference"  # nearer to 4096 than to 8192
    assert norm(width=6000).implementation == "triton"  # nearer to 8192, as ratios go


def test_another_torchs_measurement_says_so() -> None:
    """Which counts all the same."""
    with_patch = replace(TABLE, versions={"torch": f"{'.'.join(torch.__version__.split('.')[:2])}.99+cu999"})
    assert norm(table=with_patch) == norm()
    other = norm(table=replace(TABLE, versions={"torch": "1.13.1+cu117"}))
    assert other == Choice("triton", f"{norm().reason} with torch 1.13")


def test_auto_tells_compiled_from_eager() -> None:
    eager = norm(width=4096, compiled=False)
    assert eager.implementation == "triton"
    assert "4.00x the reference in eager mode" in eager.reason


def test_what_was_won_clearly_speaks_for_more_shapes() -> None:
    """4 times as fast, as in eager mode, applies to 16 times the rows; 1.8 times, as compiled, to twice."""
    assert norm(width=4096, rows=16 * 8192, compiled=False).implementation == "triton"
    assert norm(width=4096, rows=512, compiled=False).implementation == "triton"
    assert "near this shape" in norm(width=4096, rows=32 * 8192, compiled=False).reason
    assert norm(rows=2 * 8192).implementation == "triton"
    assert "near this shape" in norm(rows=2 * 8192 + 1).reason


def test_a_measurement_speaks_for_its_own_dtype() -> None:
    assert norm(width=4096).implementation == "reference"
    assert norm(width=4096, dtype="float32").implementation == "triton"


def test_a_measurement_speaks_for_its_own_variant() -> None:
    """The nearest shape is of a variant that does not apply; the others are too far away."""
    assert norm(width=16384, variants=("residual carried", "vocabulary whole")).implementation == "reference"
    uncarried = norm(width=16384, variants=("residual not carried", "vocabulary whole"))
    assert uncarried.implementation == "triton"
    assert "1.20x the reference compiled (residual not carried)" in uncarried.reason
    assert norm(rows=1024, variants=("sequence sharded",)).implementation == "triton"
    assert "near this shape" in norm(rows=1024, variants=("residual carried",)).reason
    only = replace(TABLE, cells=tuple(cell for cell in CELLS if cell.variant == "sequence sharded"))
    left = norm(rows=1024, variants=("residual carried",), table=only)
    assert left == Choice("reference", "not measured compiled in bfloat16 on sm_99 (residual carried)")


def test_a_win_within_the_noise_is_no_win() -> None:
    swiglu = choose("swiglu", "auto", shape={"rows": 8192, "width": 14336}, **HERE)
    assert swiglu.implementation == "reference"
    assert "1.01x" in swiglu.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": None}, "no GPU"),
        ({"architecture": None, "interpreted": True}, "no GPU"),
        ({"rows": 100}, "not measured compiled on sm_99 near this shape"),
        ({"dtype": "float16"}, "not measured compiled in float16 on sm_99"),
        ({"architecture": "sm_98", "table": None}, "not measured on sm_98"),
        ({"table": replace(TABLE, cells=())}, "not measured compiled in bfloat16 on sm_99"),
    ],
)
def test_auto_without_a_measurement_is_the_reference(changes: dict[str, Any], reason: str) -> None:
    chosen = norm(**changes)
    assert chosen.implementation == "reference"
    assert reason in chosen.reason


def test_asked_for() -> None:
    assert norm("reference") == Choice("reference", "asked for")
    assert norm("triton", width=4096) == Choice("triton", "asked for")
    assert norm("triton", architecture=None, interpreted=True).implementation == "triton"
    with pytest.raises(ValueError, match='rms_norm = "triton" needs a GPU, and there is none'):
        norm("triton", architecture=None)


def test_triton_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert norm() == Choice("reference", "triton is not installed")
    with pytest.raises(ValueError, match="needs the triton package"):
        norm("triton")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no operator 'layer_norm'"):
        choose("layer_norm", "auto", shape={}, **HERE)
    with pytest.raises(ValueError, match='"fast" is none of auto, triton, reference'):
        norm("fast")
    with pytest.raises(ValueError, match="described by the sizes rows, width; got rows"):
        choose("swiglu", "auto", shape={"rows": 1}, **HERE)
    with pytest.raises(ValueError, match="every size must be positive"):
        norm(rows=0)
    with pytest.raises(ValueError, match="the table is of sm_99, the device is sm_80"):
        norm(architecture="sm_80")


def test_table_survives_json() -> None:
    assert Table.from_json(TABLE.to_json()) == TABLE


def test_committed_tables_are_of_the_architecture_they_are_named_for() -> None:
    for path in (Path(choice.__file__).parent / "measured").glob("*.json"):
        table = Table.from_json(path.read_text())
        names = [choice.table_name(table.architecture, device) for device in ("", table.device)]
        assert path.name in names
        assert table == choice.load_table(table.architecture, "" if path.name == names[0] else table.device)
        assert all(set(cell.shape) == set(choice.SHAPE_KEYS[cell.op]) for cell in table.cells)


def test_a_devices_own_measurements_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the architecture's if its own have none for the shape."""
    own = replace(TABLE, device="Another GPU", cells=(replace(CELLS[1], reference_us=50.0),))
    tables = {"sm_99.json": TABLE, "sm_99-another-gpu.json": own}
    monkeypatch.setattr(choice, "load_table", lambda *names: tables.get(choice.table_name(*names)))
    for device, (implementation, speedup, of) in {
        "": ("triton", "1.80x", "Example GPU"),
        "A third GPU": ("triton", "1.80x", "Example GPU"),
        "Another (GPU)": ("reference", "0.50x", "Another GPU"),
    }.items():
        found = norm(table=None, device=device)
        assert found.implementation == implementation
        assert speedup in found.reason and found.reason.endswith(f"on {of}")
    assert norm(table=None, device="Another GPU", width=4096, compiled=False).reason.endswith("on Example GPU")
    # What its own show to be far slower is so at other sizes too, whatever the architecture's show.
    own = replace(own, cells=(replace(CELLS[1], reference_us=25.0, shape={"rows": 2048, "width": 8192}),))
    tables["sm_99-another-gpu.json"] = own
    assert norm(table=None, device="Another GPU").implementation == "reference"


def test_measurements_are_part_of_the_wheel() -> None:
    """The build back end's listing of the wheel contains the folder that `load_table` reads."""
    pytest.importorskip("hatchling", reason="the build back end is not installed")
    code = (
        "from hatchling.builders.wheel import WheelBuilder\n"
        "for file in WheelBuilder('.').recurse_included_files(): print(file.distribution_path)"
    )
    root = Path(choice.__file__).parents[2]
    listing = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert "titan_kernels/measured/README.md" in listing.replace("\\", "/").split()
