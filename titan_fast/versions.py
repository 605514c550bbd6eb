"""Which code a run is computed with, and on what."""

import functools
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@functools.cache
def code_version() -> str:
    """titan_fast's version and, in a git checkout, its commit, as in "0.1.0, commit 5a1a38b93c1f+" (see `commit`).
    As it was at the first call, since a run keeps the code that it has begun with."""
    found = commit(Path(__file__), (":(top)titan_fast", ":(top)kernels"))
    return ", ".join(part for part in (installed("titan_fast"), found and f"commit {found}") if part)


def describe(code: str) -> str:
    """`code` and the versions of what it runs on, in a line."""
    triton = installed("triton")
    return (
        f"titan_fast {code or 'of unknown version'}, torch {torch.__version__}, "
        f"{f'triton {triton}' if triton else 'no triton'}, Python {platform.python_version()}"
    )


def kind_of_device(device: torch.device) -> str:
    """What rounding depends on: a GPU's name, or what torch uses of a CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def commit(file: Path, among: Sequence[str]) -> str:
    """The commit of the checkout that `file` belongs to, with "+" if tracked files `among` these pathspecs differ from
    it. "" where there is no such checkout, or no git."""

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=file.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # a package may be installed inside of another checkout
        name = git("describe", "--always", "--abbrev=12", "--exclude=*")
        return f"{name}{'+' if git('status', '--porcelain', '--untracked-files=no', '--', *among) else ''}"
    except (OSError, subprocess.SubprocessError):
        return ""


def installed(package: str) -> str:
    """The version of a package, "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
