"""Pytest hooks of the kernel suite: the rehearsal without a GPU, and results as compact JSON."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.provenance import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke",
        action="store_true",
        help="tiny shapes on the CPU through Triton's interpreter: shows that the suite runs, measures nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--smoke"):
        # Read when Triton kernels are defined, which has not happened yet.
        os.environ["TRITON_INTERPRET"] = "1"
    from titan_fast.compilation import name_code

    name_code()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--smoke") or torch.cuda.is_available():
        return
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="needs a GPU, and torch sees none here; --smoke rehearses on the CPU")
    for item in items:
        if here in item.path.parents:
            item.add_marker(skip)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(environment(bool(config.getoption("--smoke"))))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Drops single samples, which would be most of the file; quantiles are in extra_info."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
