"""Results as JSON, a file per device and part; a file is always complete, whatever kills its writer."""

import json
import os
from pathlib import Path
from typing import Any

from titan_kernels.choice import slug

from titan_fast.errors import DataError


def place(out: Path, kind: str, device: str) -> Path:
    """`out` if it is a file's name, else this device's file in that folder."""
    return out if out.suffix == ".json" else out / f"{kind}-{slug(device)}.json"


def write(content: dict[str, Any], path: Path) -> None:
    """Replaces what `path` holds, atomically."""
    write_text(json.dumps(content, indent=1) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Replaces what `path` holds, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    new.write_text(text)
    new.replace(path)


def read(path: Path) -> dict[str, Any] | None:
    """None if there is no such file.

    Raises:
        DataError: it is not a JSON object, but a half-written one, for example, or a folder.
    """
    try:
        content = json.loads(path.read_text()) if path.exists() else None
    except (ValueError, OSError) as error:  # json's, bytes that are not text, or a folder
        raise DataError(f"not JSON: {error}", "measure it again, or remove the file", str(path)) from error
    if not isinstance(content, dict | None):
        raise DataError(f"a {type(content).__name__}, not a JSON object", "remove the file", str(path))
    return content


def without_driver(versions: dict[str, str]) -> dict[str, str]:
    """The versions that decide what runs. The driver does not; equal GPUs on different hosts may differ in it."""
    return {name: version for name, version in versions.items() if name != "driver"}


def short(commit: object) -> str:
    """A commit's first 7 digits, and "+" if files differed from it."""
    words = str(commit)
    return words[:7] + ("+" if words.endswith("+") else "")
