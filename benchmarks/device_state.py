"""Clocks, power and temperature of a GPU, read by a thread while steps run. Before and after them the GPU is idle, and
readings would say nothing about their speed.

`python -m benchmarks.device_state` prints the GPU's name as it is used in the names of results.
"""

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.result_files import slug

Reading = dict[str, float]
Reader = Callable[[], Reading]

# Why a GPU runs slower than it could: the bits of NVML's clock event reasons.
_SLOWED_BY = {0x4: "power limit", 0x8: "hardware", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}
_SMI_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
    "power.limit": "watts_limit",
    "clocks.max.sm": "sm_mhz_max",
}
_SMI_TIMEOUT_SECONDS = 10.0


def reader_of(device: torch.device) -> tuple[Reader, float] | None:
    """(a function that reads `device` once, the seconds between readings at which it disturbs nothing): NVML if its
    Python package (nvidia-ml-py) is installed, else nvidia-smi; None if neither works."""
    if device.type != "cuda":
        return None
    number = str(device.index or 0)
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", "unknown")
    names = (f"GPU-{identity}", number)  # the number, if the other is unknown
    for make, interval in ((_nvml_reader, 0.25), (_smi_reader, 2.0)):
        for name in names:
            try:
                reader = make(name)
                if "sm_mhz" in reader():
                    return reader, interval
            except Exception:  # a missing package, library or program, each with its own exception
                continue
    return None


def _nvml_reader(name: str) -> Reader:
    import pynvml as nvml  # type: ignore[import-not-found]

    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    questions: dict[str, Callable[[], float]] = {
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        "watts_limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "sm_mhz_max": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
    }
    return lambda: answered(questions)


def answered(questions: dict[str, Callable[[], float]]) -> Reading:
    """The answers there are; a virtual machine may not know its power, for example."""
    found: Reading = {}
    for name, ask in questions.items():
        try:
            found[name] = float(ask())
        except Exception:  # NVML has its own
            continue
    return found


def _smi_reader(name: str) -> Reader:
    command = ["nvidia-smi", f"--id={name}", f"--query-gpu={','.join(_SMI_FIELDS)}"]

    def read() -> Reading:
        answer = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_SECONDS,
        ).stdout  # fmt: skip
        return parsed_smi(answer)

    return read


def parsed_smi(line: str) -> Reading:
    """The numbers in nvidia-smi's answer, without those that it does not know ("[N/A]")."""
    found = {}
    for name, word in zip(_SMI_FIELDS.values(), line.strip().split(","), strict=True):
        try:
            found[name] = float(word)
        except ValueError:
            continue
    return found


def device_name() -> str:
    """The GPU's name from nvidia-smi, which is also torch's: for a process that must not touch the GPU."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_SECONDS)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


class DeviceWatch:
    """Reads the device inside a `with`; without a reader it does nothing."""

    def __init__(self, source: tuple[Reader, float] | None) -> None:
        self._source = source
        self._readings: list[tuple[float, Reading]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="device watch", daemon=True)

    def __enter__(self) -> "DeviceWatch":
        if self._source is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _read(self) -> None:
        assert self._source is not None
        reader, interval = self._source
        while not self._stopping.wait(interval):
            try:
                self._readings.append((time.perf_counter(), reader()))
            except Exception:  # a missing reading must not end the measurement
                continue

    def during(self, spans: Iterable[tuple[float, float]]) -> dict[str, Any]:
        """For the readings within `spans` (of time.perf_counter): {quantity: [least, median, most]}, their number, and
        what slowed the clock down. Empty if there was none."""
        wanted = list(spans)
        readings = [r for at, r in list(self._readings) if any(start <= at <= end for start, end in wanted)]
        return summary(readings)


def summary(readings: list[Reading]) -> dict[str, Any]:
    """What `DeviceWatch.during` returns for these readings."""
    if not readings:
        return {}
    found: dict[str, Any] = {"readings": len(readings)}
    for name in _SMI_FIELDS.values():
        values = [reading[name] for reading in readings if name in reading]
        if values:
            found[name] = [min(values), statistics.median(values), max(values)]
    reasons = 0
    for reading in readings:
        reasons |= int(reading.get("reasons", 0))
    found["slowed_by"] = sorted({word for bit, word in _SLOWED_BY.items() if reasons & bit})
    return found


if __name__ == "__main__":
    sys.stdout.write(f"{slug(device_name())}\n")
