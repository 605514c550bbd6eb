"""`python -m titan_fast.checkpoint list|verify|prune|export DIR`: manages a run's checkpoints without the run."""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from titan_fast import manifest
from titan_fast.checkpoint import checkpoints_of, load_tensors, read_config, read_state, saved_tensors
from titan_fast.command_line import Parser
from titan_fast.errors import CheckpointError, ConfigError, command
from titan_fast.hf_files import save_readable
from titan_fast.run_lock import without_a_run


def folders(path: Path) -> dict[int, Path]:
    """The checkpoints at `path`: a run directory, its checkpoint folder, or a `step-N` itself. CheckpointError where
    there is none."""
    single = manifest.checkpoints(path.absolute().parent)
    for step, folder in single.items():
        if folder.name == path.absolute().name:
            return {step: folder}
    if found := checkpoints_of(path):
        return found
    raise CheckpointError("no checkpoint here", "give a run directory or its checkpoint folder", str(path))


_GONE = "deleted meanwhile"


def _wrong(folder: Path, problem: str) -> str:
    """What to say of a checkpoint with a problem: that a run which goes on has deleted it, if it is no longer there."""
    if not folder.exists():
        return _GONE
    return f"{'CANNOT BE READ' if isinstance(problem, manifest.Unread) else 'DAMAGED'}: {problem}"


def list_lines(path: Path) -> list[str]:
    """A line per checkpoint: step, size, what state.json says, and the first thing wrong by name and size. Then a line
    for each that was set aside."""
    lines = []
    for step, folder in folders(path).items():
        problem = manifest.problem(folder, contents=False)
        if problem:
            lines.append(f"step {step:>8}  {_wrong(folder, problem)}")
            continue
        try:
            size = sum(digest.size for digest in manifest.read(folder).values())
        except ValueError as error:
            lines.append(f"step {step:>8}  {_wrong(folder, str(error))}")
            continue
        try:
            state = read_state(folder)
            said = (
                f"{int(state['tokens_seen']):>15,} tokens  world size {state['world_size']}  torch {state.get('torch')}"
            )
        except (CheckpointError, TypeError, ValueError, OverflowError):
            said = "and its state.json cannot be read"
        lines.append(f"step {step:>8}  {_mebibytes(size)}  {said}")
    for aside in manifest.superseded(folder.parent):
        size = sum(file.lstat().st_size for file in aside.rglob("*"))
        lines.append(f"{_mebibytes(size)}  {aside.name}: set aside, since the run went back; prune --superseded")
    return lines


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:10.1f} MiB"


def verify(path: Path) -> tuple[list[str], list[str]]:
    """A line per checkpoint, with every byte read; and what is wrong with those that are not whole."""
    lines, problems = [], []
    for step, folder in folders(path).items():
        problem = manifest.problem(folder)
        said = "whole" if problem is None else _wrong(folder, problem)
        lines.append(f"step {step:>8}  {said}")
        if problem is not None and said != _GONE:
            problems.append(problem)
    return lines, problems


def export(path: Path, out: Path) -> list[str]:
    """Writes the newest whole checkpoint's weights (not the moments) into one safetensors file, names as in the model.
    The Hugging Face layout is `python -m titan_fast.hf export`."""
    for folder in reversed(folders(path).values()):
        problem = manifest.problem(folder)
        if problem is None:
            break
        if isinstance(problem, manifest.Unread):
            raise CheckpointError(f"it cannot be read: {problem}", "fix that, or name another step-N", str(folder))
        sys.stderr.write(f"{folder.name} is skipped: {problem}\n")
    else:
        raise CheckpointError("no checkpoint here is whole", "restore one from a copy", str(path))
    if out.exists():
        raise ConfigError("the file to write exists", "name another with --out", str(out))
    if manifest.holding(out):
        raise ConfigError("nothing may be added to a checkpoint", "choose another --out", str(out))
    model = read_config(folder).get("model", {})
    flavor = model.get("flavor") if isinstance(model, dict) else None
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved_tensors(folder).items()
        if name.startswith("model.")
    }
    load_tensors(tensors, folder)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        save_readable(weights, temporary, {"step": str(read_state(folder)["step"])})
        manifest.sync_file(temporary)
        temporary.replace(out)
        manifest.sync_folder(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write: {what}", "name another --out, or make room", str(out)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return [f"{out}: {len(weights)} tensors of {flavor}, {folder.name}"]


@command
def main() -> None:
    parser = Parser(prog="titan_fast.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    for name, words in (
        ("list", "a line per checkpoint"),
        ("verify", "read every byte; exit status 4 where one is damaged"),
        (
            "prune",
            "delete all but the newest whole ones, of which every byte is read, and what a kill left half done; "
            "refused while a run is using them",
        ),
        ("export", "the weights as one safetensors file"),
    ):
        sub = commands.add_parser(name, help=words)
        one = "" if name == "prune" else ", or a step-N folder"
        sub.add_argument("dir", type=Path, help=f"a run directory or its checkpoint folder{one}")
        if name == "prune":
            sub.add_argument("--keep", type=int, help="how many to keep: 3, or with --superseded all")
            sub.add_argument("--keep-every", type=int, help="keep those of multiples of this step too")
            sub.add_argument(
                "--superseded", action="store_true", help="delete those that were set aside when a run went back"
            )
        if name == "export":
            sub.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args()
    problems: list[str] = []
    if options.action == "list":
        lines = list_lines(options.dir)
    elif options.action == "verify":
        lines, problems = verify(options.dir)
    elif options.action == "export":
        lines = export(options.dir, options.out)
    else:
        lines = prune(options.dir, options.keep, options.keep_every, options.superseded)
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    if problems:
        what, fix = "a checkpoint is damaged", "restore it from a copy or move it away"
        if all(isinstance(problem, manifest.Unread) for problem in problems):
            what, fix = "a checkpoint cannot be read", "see what is wrong with its disk"
            if all(os.strerror(errno.EACCES) in problem for problem in problems):
                fix = "give this user the right to read it"
        raise CheckpointError(what, fix, str(options.dir))


def prune(path: Path, keep: int | None, every: int | None, superseded: bool) -> list[str]:
    """Deletes all but the `keep` newest whole checkpoints, of which every byte is read; damaged ones among these stay,
    and those of multiples of step `every`. superseded: deletes those that a run set aside when it went back, and others
    only where `keep` is given, which else is 3. ConfigError if a run is using them."""
    if keep is not None and keep < 1:
        raise ConfigError(f"--keep is {keep}", "keep at least 1")
    if every is not None and every < 1:
        raise ConfigError(f"--keep-every is {every}", "give a number of steps")
    if superseded and keep is None:
        if every is not None:
            raise ConfigError("--keep-every without --keep: with --superseded all others are kept", "give both")
        keep = 0  # all
    elif keep is None:
        keep = 3
    parent = next(iter(folders(path).values())).parent
    if parent == path.absolute().parent:
        raise ConfigError("prune takes the folder that holds the checkpoints, not one of them", "name that", str(path))
    if not parent.resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"this run's config has its checkpoints elsewhere, in {parent}",
            "name that folder, if it is the right one",
            str(path),
        )
    with without_a_run(parent):
        lines = manifest.clean(parent)
        deleted, left = manifest.prune(parent, keep, every or 0)
        lines += [f"deleted step {step}" for step in deleted]
        for folder in manifest.superseded(parent) if superseded else ():
            if remains := manifest.delete(folder):
                left.append(remains)
            else:
                lines.append(f"deleted {folder.name}")
    lines += [f"could not delete {path}" for path in left]
    return lines or [f"nothing to delete: no more than {keep} whole checkpoints" if keep else "nothing to delete"]


if __name__ == "__main__":
    main()
