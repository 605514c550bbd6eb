"""Processes that begin with everything imported, and runs in them that may die on purpose."""

import importlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import faults
import runs

# A clean process imports this module once and is copied for each child, which saves the seconds that importing torch
# and the rest take. A copy of the caller itself would hang: by then its compute threads may exist, and a copy has none.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["children"])


def run_silently(place: str | None, call: int, data: Path, folder: Path, more: dict[str, Any]) -> None:
    """A run whose output goes nowhere; with a `place` ("module:function") it is killed in that call of it."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if place is not None:
        module, _, name = place.partition(":")
        target: Any = importlib.import_module(module)
        *path, function = name.split(".")
        for part in path:
            target = getattr(target, part)
        faults.kill_in(target, function, call)
    runs.run(data, folder, **more)
