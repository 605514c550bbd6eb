"""The measurements of whole steps: the rows of all files in a folder, by device."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.least_step import Limits
from benchmarks.result_files import read
from benchmarks.train_cells import PARTS, cells
from benchmarks.train_record import fraction_of_limit, known_limits, options_of, settings_of, with_versions
from benchmarks.workloads import shape_of
from titan_fast.errors import DataError

Row = dict[str, Any]


@dataclass
class Device:
    """All rows of one device, by (cell, variant), each with its versions."""

    name: str
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def found(self, **wanted: object) -> list[Row]:
        """Rows whose fields are these."""
        return [row for row in self.rows.values() if all(row.get(key) == value for key, value in wanted.items())]


def load(folder: Path, rehearsal: bool) -> list[Device]:
    """Every device's rows, with parts merged; of rehearsals or of real devices.

    Raises:
        DataError: a file that is not JSON, or has no rows or no device.
    """
    devices: dict[str, Device] = {}
    for path in sorted(folder.glob("train-*.json")):
        content = read(path) or {}
        environment = content.get("environment", {})
        if "device" not in environment or "rows" not in content:
            what = "no rows, or no environment that names their device"
            raise DataError(what, "measure the part again, or remove the file", str(path))
        if bool(environment.get("smoke")) != rehearsal:
            continue
        device = devices.setdefault(environment["device"], Device(environment["device"]))
        rows = [with_versions(row, environment) for row in content["rows"]]
        device.rows |= {(row["cell"], row["variant"]): row for row in rows}
    for device in devices.values():
        known = known_limits(folder, device.name)
        if known is not None and not rehearsal:
            _add_fractions(device, known)
    return list(devices.values())


def _add_fractions(device: Device, limits: Limits) -> None:
    """Of these limits, whatever a row was recorded with: all rows have the same limit."""
    by_name = {(cell.name, cell.part): cell for cell in cells(PARTS)}
    for row in device.rows.values():
        cell = by_name.get((row["cell"], row["part"]))
        if cell is None or "step_seconds" not in row or options_of(cell, row["variant"]) is None:
            continue
        config, shape = settings_of(cell, row["variant"], False), shape_of(cell.workload, False)
        row |= fraction_of_limit(limits, config, shape, row["world"], row["step_seconds"]["median"])
