"""Processes that start with everything imported, and runs in them that may be killed on purpose."""

import importlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import faults
import runs

# A clean process imports this module once and is forked for each child, which saves the seconds of importing torch and
# the rest. A fork of the caller would hang, because it lacks the compute threads that the caller may have by then.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["children"])


def run_silently(place: str | None, call: int, data: Path, folder: Path, more: dict[str, Any]) -> None:
    """A run without output; with a `place` ("module:function") it is killed in that call of it."""
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
