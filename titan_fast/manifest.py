"""Folders that are whole or not there: written under another name, made durable, listed with sizes and sha256, renamed.

A folder `step-N` with a MANIFEST.json was once complete on the disk. `problem` says what is wrong with it now. The
digests protect against accidents, not against attackers: whoever can write the folder can write the manifest too.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from titan_fast.errors import CheckpointError

NAME = "MANIFEST.json"
FORMAT = 1
LATE_SECONDS = 10.0
"""So long it may take a network file system to show one host what another has written."""
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_SUPERSEDED = re.compile(r"superseded-[0-9]+-step-(0|[1-9][0-9]{0,17})")
_LEFTOVER = re.compile(r"\.(writing|deleting|replaced)-((?:superseded-[0-9]+-)?step-(?:0|[1-9][0-9]{0,17}))")


class Digest(NamedTuple):
    """Of one file."""

    size: int
    sha256: str


def folder_of(parent: Path, step: int) -> Path:
    """The place of step `step`'s checkpoint."""
    return parent / f"step-{step}"


def step_of(path: Path) -> int | None:
    """The step by the name of a checkpoint's folder; None for another name."""
    found = _STEP.fullmatch(path.absolute().name)
    return int(found[1]) if found else None


def writing(final: Path) -> Path:
    """Where `final` is written before it is published."""
    return final.with_name(f".writing-{final.name}")


def checkpoints(parent: Path) -> dict[int, Path]:
    """The folders in `parent` that are named exactly `step-N`, by step in order; links and other names are not ours."""
    return {step: path for step, path in _named(parent).items() if path.is_dir() and not path.is_symlink()}


def links(parent: Path) -> dict[int, Path]:
    """Symbolic links in `parent` that have the name of a checkpoint, wherever they lead, by step in order."""
    return {step: path for step, path in _named(parent).items() if path.is_symlink()}


def superseded(parent: Path) -> list[Path]:
    """The checkpoints in `parent` that a run set aside when it went back to an earlier step, in the order of names."""
    paths = parent.iterdir() if parent.is_dir() else ()
    return sorted(path for path in paths if _SUPERSEDED.fullmatch(path.name) and path.is_dir())


def set_aside(folder: Path) -> Path:
    """Renames a checkpoint from which the run does not go on. Returns the new path."""
    names = (folder.with_name(f"superseded-{second}-{folder.name}") for second in count(int(time.time())))
    return folder.rename(next(name for name in names if not name.exists()))


def _named(parent: Path) -> dict[int, Path]:
    paths = parent.iterdir() if parent.is_dir() else ()
    return dict(sorted((int(match[1]), path) for path in paths if (match := _STEP.fullmatch(path.name))))


def holding(path: Path) -> Path | None:
    """The published folder that `path` is or lies in, if any. Nothing may be added to such a folder."""
    places = (path.absolute(), *path.absolute().parents)
    return next((place for place in places if _STEP.fullmatch(place.name) and (place / NAME).exists()), None)


def would_be_taken_for_one(path: Path) -> bool:
    """Whether a folder at `path` would have the name of a checkpoint and lie among checkpoints."""
    return bool(_STEP.fullmatch(path.name)) and any(
        (other / NAME).exists() for other in checkpoints(path.parent).values()
    )


def obstacle(folder: Path) -> str:
    """Why nothing can be written into a folder, which need not exist yet, judging by names and permissions; "" if
    nothing stands in the way."""
    if checkpoint := holding(folder):
        return f"{checkpoint} is a checkpoint, to which nothing may be added"
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return f"{there} is a file"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"not allowed to write in {there}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Waits until the file's content is on the disk."""
    with path.open("rb") as file:
        sync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """os.fsync. Does nothing where the file system has no such thing, as some in user space."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def write_file(path: Path, content: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def _files(folder: Path) -> list[str]:
    """Everything but folders: links, and pipes and devices too, at which a reader would wait."""
    there = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in there)
    return sorted(name for name in names if name != NAME)


def digests(folder: Path, names: Iterable[str] | None = None) -> dict[str, Digest]:
    """Size and sha256 of the files (all, or those named) below `folder`, each made durable first."""

    def digest(name: str) -> tuple[str, Digest]:
        sync_file(folder / name)
        return name, Digest((folder / name).stat().st_size, sha256(folder / name))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases Python's lock
        return dict(pool.map(digest, _files(folder) if names is None else names))


def unseen(folder: Path, sizes: dict[str, int]) -> str | None:
    """The first of the files (name to bytes) of other processes that does not appear in `folder` with its size within
    LATE_SECONDS; None when all do."""
    give_up = time.monotonic() + LATE_SECONDS
    while sizes := {name: size for name, size in sizes.items() if not _has_size(folder / name, size)}:
        if time.monotonic() >= give_up:
            return min(sizes)
        time.sleep(0.2)
        with suppress(OSError):
            list(folder.iterdir())  # makes a network file system ask its server again
    return None


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.lstat().st_size == size
    except OSError:
        return False


def publish(temporary: Path, final: Path, known: dict[str, Digest] | None = None, **about: Any) -> None:
    """Makes `temporary` durable and renames it to `final`, replacing an older folder of that name.

    `known`: digests of files that other processes have already made durable; the rest is done here. `about`: JSON
    values to store in the manifest. OSError where the disk refuses, CheckpointError where files of other processes are
    not visible here."""
    files = dict(known or {})
    if missing := unseen(temporary, {name: digest.size for name, digest in files.items()}):
        raise CheckpointError(
            f"{missing}, which another rank has written, is not in rank 0's folder",
            "all ranks need one shared folder",
            str(temporary),
        )
    files |= digests(temporary, [name for name in _files(temporary) if name not in files])
    entries = {name: [digest.size, digest.sha256] for name, digest in sorted(files.items())}
    (temporary / NAME).unlink(missing_ok=True)
    write_file(temporary / NAME, json.dumps({"format": FORMAT, **about, "files": entries}, indent=1).encode())
    for path in temporary.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            sync_folder(path)
    sync_folder(temporary)
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read(folder: Path) -> dict[str, Digest]:
    """The files that the manifest lists. ValueError that says why, where there is no manifest or it is not one of
    ours."""
    if (folder / NAME).is_fifo():  # reading it would wait for a writer
        raise ValueError(f"{NAME} is damaged")
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError
        files = {str(name): Digest(int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except OSError as error:
        raise ValueError(f"{NAME} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{NAME} is damaged") from error
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"{NAME} names a file outside the folder: {name!r}")
    return files


class Unread(str):
    """A problem that says nothing about the content: the folder may be whole, but this process cannot read it now."""


def _unread(name: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name}: missing"
    words = f"{name}: {error.strerror}"
    return words if error.errno == errno.EIO else Unread(words)  # EIO means that the disk is damaged


def problem(folder: Path, contents: bool = True, part: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a published folder, None when nothing is: a file missing, of another size or (with
    `contents`) another sha256, a link, a file that was not there, or one that cannot be read (`Unread`). `part` (i, n)
    looks only at every n-th file from the i-th on, so that n processes share the work: if 4096 ranks each looked at all
    files, a file server would get a hundred million requests. Only the first looks for files that were not there."""
    try:
        files = read(folder)
        extra = set(_files(folder)) - files.keys() if part[0] == 0 else set()
    except OSError as error:
        return _unread(folder.name, error)
    except ValueError as error:
        return Unread(error) if isinstance(error.__cause__, OSError) else str(error)
    if extra:
        return f"{min(extra)}: not in {NAME}"
    files = dict(sorted(files.items())[part[0] :: part[1]])
    for name, digest in files.items():
        try:
            status = (folder / name).lstat()
        except OSError as error:
            return _unread(name, error)
        if not stat.S_ISREG(status.st_mode):
            return f"{name}: not a regular file"
        if status.st_size != digest.size:
            return f"{name}: {status.st_size} bytes, not {digest.size}"
    return _changed(folder, files) if contents else None


def _changed(folder: Path, files: dict[str, Digest]) -> str | None:
    def changed(name: str) -> str | None:
        try:
            return None if sha256(folder / name) == files[name].sha256 else f"{name}: sha256 mismatch"
        except OSError as error:
            return _unread(name, error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next(filter(None, pool.map(changed, files)), None)


def prune(
    parent: Path,
    keep: int,
    every: int = 0,
    always: int | None = None,
    contents: bool = True,
    damaged: Collection[int] = (),
) -> tuple[list[int], list[Path]]:
    """Deletes the folders of steps before the `keep` newest whole ones (0 keeps all), except those of multiples of
    `every` (0: no exception). Returns the deleted steps, and what could not be deleted. A folder is whole by its
    manifest, sizes and (with `contents`) sha256, unless its step is in `damaged`. Folders that are not whole do not
    count; the step `always` and folders without a manifest are left alone."""
    found = checkpoints(parent)
    newest_first = (step for step in reversed(found) if step not in damaged)
    whole = list(islice((step for step in newest_first if problem(found[step], contents) is None), keep))
    if not keep or len(whole) < keep:
        return [], []
    stay = {always, *(step for step in found if every and step % every == 0)}
    old = [step for step, path in found.items() if step < whole[-1] and step not in stay and (path / NAME).exists()]
    left = {step: doomed for step in old if (doomed := delete(found[step]))}
    return [step for step in old if step not in left], list(left.values())


def delete(folder: Path) -> Path | None:
    """Deletes a published folder: renames it first, in one step, then deletes its files. Raises nothing where the disk
    refuses, but returns what is left of this folder or of an earlier one with its name, if anything."""
    doomed = folder.with_name(f".deleting-{folder.name}")
    with suppress(OSError):
        shutil.rmtree(doomed, ignore_errors=True)
        if not doomed.exists():
            folder.rename(doomed)
            sync_folder(folder.parent)
            shutil.rmtree(doomed, ignore_errors=True)
    return next((left for left in (doomed, folder) if os.path.lexists(left)), None)


def leftover_bytes(parent: Path) -> int:
    """Size of what `clean` would and may delete. A run that is still going on may be deleting it at the same time."""
    total = 0
    for folder in parent.glob(".*"):
        match = _LEFTOVER.fullmatch(folder.name)
        if match and not folder.is_symlink() and (match[1] != "replaced" or folder.with_name(match[2]).exists()):
            with suppress(FileNotFoundError):
                for file in folder.rglob("*"):
                    if os.access(file.parent, os.W_OK | os.X_OK):
                        total += file.lstat().st_size
    return total


def clean(parent: Path) -> list[str]:
    """Cleans up after a killed process: puts back a folder that was being replaced and has no successor, and deletes
    what was being written or deleted. Returns lines about what it did or could not do. What cannot be deleted is
    renamed, since the next save of that step needs its name. Only for the one process that owns `parent`."""
    done = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir():
            continue
        final = path.with_name(match[2])
        if match[1] == "replaced" and not final.exists() and problem(path, contents=False) is None:
            path.rename(final)
            done.append(f"put back {final.name}, whose replacement was never finished")
            continue
        shutil.rmtree(path, ignore_errors=True)
        words = "was never finished" if match[1] == "writing" else "was on its way out"
        done.append(f"{'could not delete' if path.exists() else 'deleted'} {path.name}, which {words}")
        aside = path.with_name(f".deleting-{final.name}")
        if path.exists() and not aside.exists():
            with suppress(OSError):
                path.rename(aside)
    if done:
        sync_folder(parent)
    return done
