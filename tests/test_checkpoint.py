"""How checkpoints are loaded that a disk, a kill or another person has damaged."""

import errno
import hashlib
import importlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import runs
import safetensors.torch
import torch
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from torchrun import start
from worlds import Task, World, results, run_world

from titan_fast import checkpoint_command, checkpointer, distributed, generate, loop, manifest, safe_unpickle
from titan_fast.checkpoint import Progress, check_tensors, gather_data_state, own_data_state, tensors_of
from titan_fast.config import mesh_degrees, model_shape, parse
from titan_fast.errors import CheckpointError, NumericsError, TitanFastError
from titan_fast.flavors import ModelShape
from titan_fast.flops import parameter_count
from titan_fast.initial_weights import checkpoint_folder
from titan_fast.model import Llama, init_weights
from titan_fast.ops import REFERENCE
from titan_fast.optim import build_optimizer
from titan_fast.run_lock import RunLock
from titan_fast.shards import local
from titan_fast.step import build_model

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps with checkpoints at 5 and 10."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    runs.run(data, folder)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def shard(folder: Path, step: int) -> Path:
    return next(runs.checkpoint(folder, step).glob("*.distcp"))


def flip_a_bit(folder: Path) -> None:
    content = bytearray(shard(folder, 10).read_bytes())
    content[len(content) // 2] ^= 1
    shard(folder, 10).write_bytes(content)


def truncate(folder: Path) -> None:
    shard(folder, 10).write_bytes(shard(folder, 10).read_bytes()[:-1])


def link(folder: Path) -> None:
    path = shard(folder, 10)
    path.symlink_to(path.rename(folder / "moved"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit flipped": (flip_a_bit, r"__0_0.distcp: sha256 mismatch"),
    "a byte cut off": (truncate, r"__0_0.distcp: \d+ bytes, not \d+"),
    "a shard deleted": (lambda folder: shard(folder, 10).unlink(), r"__0_0.distcp: missing"),
    "a link for a shard": (link, r"__0_0.distcp: not a regular file"),
    "the manifest deleted": (
        lambda folder: (runs.checkpoint(folder, 10) / manifest.NAME).unlink(),
        r"MANIFEST.json is missing",
    ),
    "the manifest torn": (
        lambda folder: (runs.checkpoint(folder, 10) / manifest.NAME).write_text('{"format": 1, "fi'),
        r"MANIFEST.json is damaged",
    ),
    "a size that is none": (
        lambda folder: (runs.checkpoint(folder, 10) / manifest.NAME).write_text(
            json.dumps({"format": manifest.FORMAT, "files": {"x": [math.inf, ""]}})
        ),
        r"MANIFEST.json is damaged",
    ),
    "a pipe for the manifest": (
        lambda folder: (
            (runs.checkpoint(folder, 10) / manifest.NAME).unlink(),
            os.mkfifo(runs.checkpoint(folder, 10) / manifest.NAME),
        ),
        r"MANIFEST.json is damaged",
    ),
    "a file added": (lambda folder: (runs.checkpoint(folder, 10) / "x.py").touch(), r"x.py: not in MANIFEST.json"),
    "a pipe added": (lambda folder: os.mkfifo(runs.checkpoint(folder, 10) / "x"), r"x: not in MANIFEST.json"),
    "a pipe for a shard": (
        lambda folder: (path := shard(folder, 10), path.unlink(), os.mkfifo(path)),
        r"__0_0.distcp: not a regular file",
    ),
    "state.json edited": (
        lambda folder: (runs.checkpoint(folder, 10) / "state.json").write_text("{}"),
        r"state.json: 2 bytes",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    name: str, data: Path, finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, reason = DAMAGE[name]
    damage(copy)
    before = runs.losses(copy)
    runs.run(data, copy)
    said = capsys.readouterr().out
    assert re.search(rf"step-10 is not loaded \({reason}", said), said
    assert "goes on" in said and "after step 5," in said
    assert runs.losses(copy) == before, "steps 6 to 10 must come out as they did"
    runs.assert_same_tensors(runs.checkpoint(copy, 10), runs.checkpoint(finished, 10))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = runs.Disk(monkeypatch)
    runs.run(data, tmp_path / "run")
    for step in (5, 10):
        disk.assert_made_durable(runs.checkpoint(tmp_path / "run", step))


def test_ranks_look_at_every_file_between_them(data: Path, tmp_path: Path) -> None:
    """Each hashes its part. Whichever file is damaged, in whichever part, all ranks skip the step."""
    more: dict[str, Any] = {"training__steps": 4, "checkpoint__interval": 2}
    output = runs.finish(start(2, data, tmp_path / "run", [], **more))
    folder = runs.checkpoint(tmp_path / "run", 4)
    shards = sorted(folder.glob("*.distcp"))
    assert len(shards) == 2, output
    for path in shards:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / path.stem))
        (runs.checkpoint(copy, 4) / path.name).write_bytes(content)
        process = start(2, data, copy, [], **more)
        output = runs.finish(process)
        assert process.returncode == 0 and "after step 2," in output, output
        assert f"step-4 is not loaded ({path.name}: sha256 mismatch" in output, output


def test_a_rank_of_many_looks_at_its_own_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand that looked at two files of each other would ask a file server for millions."""
    temporary, final = tmp_path / "temporary", tmp_path / "step-1"
    temporary.mkdir()
    for rank in range(64):
        (temporary / f"__{rank:02}_0.distcp").write_bytes(b"shard")
    manifest.publish(temporary, final)
    looked: list[str] = []
    for name in ("stat", "lstat", "scandir"):
        true = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *a, _true=true, **k: (looked.append(str(path)), _true(path, *a, **k))[1]
        )
    parts = []
    for rank in range(16):
        looked.clear()
        assert manifest.problem(final, part=(rank, 16)) is None
        parts.append({path for path in looked if path.endswith(".distcp")})
    assert [len(part) for part in parts[1:]] == [4] * 15 and len(set().union(*parts)) == 64
    (final / "__17_0.distcp").unlink()
    (final / "more").touch()
    said = [problem for rank in range(16) if (problem := manifest.problem(final, part=(rank, 16)))]
    assert said == ["more: not in MANIFEST.json", "__17_0.distcp: missing"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(
    number: int, data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be skipped, and then overwritten. EIO however is how a disk reports damage."""
    path, hashed = shard(copy, 10), manifest.sha256

    def sha256(file: Path) -> str:
        if file == path:
            raise OSError(number, os.strerror(number))
        return hashed(file)

    monkeypatch.setattr(manifest, "sha256", sha256)
    content = path.read_bytes()
    if number == errno.EIO:
        runs.run(data, copy)
        assert "step-10 is not loaded (__0_0.distcp: Input/output error)" in capsys.readouterr().out
        return
    with pytest.raises(CheckpointError, match=rf"step-10 may be whole and cannot be read: .*{os.strerror(number)}"):
        runs.run(data, copy, training__steps=12)
    assert path.read_bytes() == content and not runs.checkpoint(copy, 12).exists()
    capsys.readouterr()
    status, out, err = command(capsys, "verify", str(copy))
    assert status == 4 and f"CANNOT BE READ: __0_0.distcp: {os.strerror(number)}" in out
    fix = "give this user the right" if number == errno.EACCES else "see what is wrong with its disk"
    assert f"a checkpoint cannot be read; {fix}" in err.replace(f" [{copy}]", "")


@pytest.mark.parametrize("name", ["one bit flipped", "a shard deleted"])
def test_strict_stops_at_damage(name: str, data: Path, copy: Path) -> None:
    DAMAGE[name][0](copy)
    with pytest.raises(CheckpointError, match="step-10 is not loaded") as caught:
        runs.run(data, copy, checkpoint__strict=True)
    assert caught.value.exit_status == 4


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence(data: Path, copy: Path) -> None:
    for step in (5, 10):
        shard(copy, step).unlink()
    with pytest.raises(CheckpointError, match=r"step-10 is not loaded .*; step-5 is not loaded"):
        runs.run(data, copy)


def test_a_rank_that_does_not_see_what_rank_0_chose_stops_all(data: Path, copy: Path) -> None:
    """As on a network file system where one host sees a new folder later than another."""
    process = start(2, data, copy, [{"what": "blind", "rank": 1}], training__steps=15)
    output = runs.finish(process)
    assert process.returncode != 0
    assert "rank 1 does not see the manifest of step-10 that rank 0 sees" in output
    assert max(runs.losses(copy)) == 10, "nothing was trained from a mixture"


def test_an_asked_for_step_is_not_replaced_by_another(data: Path, copy: Path) -> None:
    flip_a_bit(copy)
    with pytest.raises(CheckpointError, match=r"step-10 is not loaded .*sha256 mismatch"):
        runs.run(data, copy, checkpoint__load_step=10)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are \[5, 10\]"):
        runs.run(data, copy, checkpoint__load_step=7)


def test_going_back_sets_later_checkpoints_aside(data: Path, copy: Path) -> None:
    runs.run(data, copy, checkpoint__load_step=5, training__steps=6)
    names = sorted(path.name for path in (copy / "checkpoint").iterdir())
    assert names[0] == "step-5" and names[1] == "step-6" and names[2].endswith("-step-10"), names
    assert manifest.problem(copy / "checkpoint" / names[2]) is None


def test_what_was_set_aside_is_listed_and_deleted_when_asked_for(
    data: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.run(data, copy, checkpoint__load_step=5, training__steps=6)
    assert f"prune {copy / 'checkpoint'} --superseded" in capsys.readouterr().out
    (aside,) = manifest.superseded(copy / "checkpoint")
    assert f"MiB  {aside.name}: set aside" in command(capsys, "list", str(copy))[1]
    assert command(capsys, "prune", str(copy))[1].startswith("nothing to delete") and aside.exists()
    for step in (7, 8, 9):
        shutil.copytree(runs.checkpoint(copy, 6), runs.checkpoint(copy, step))
    assert command(capsys, "prune", str(copy), "--superseded", "--keep-every", "2")[0] == 2
    (killed := aside.with_name(f".deleting-{aside.name}1")).mkdir()  # by an earlier one
    assert command(capsys, "prune", str(copy), "--superseded")[1] == (
        f"deleted {killed.name}, which was on its way out\ndeleted {aside.name}\n"
    )
    assert not aside.exists() and list(manifest.checkpoints(copy / "checkpoint")) == [5, 6, 7, 8, 9], "all others stay"
    assert command(capsys, "prune", str(copy), "--superseded")[1] == "nothing to delete\n"


def test_checkpoints_of_some_steps_are_kept_for_good(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {"checkpoint__interval": 2, "checkpoint__keep_latest_k": 1}
    runs.run(data, tmp_path, **more, training__steps=10, checkpoint__keep_every=4)
    assert list(manifest.checkpoints(tmp_path / "checkpoint")) == [4, 8, 10]
    capsys.readouterr()
    assert command(capsys, "prune", str(tmp_path), "--keep", "1", "--keep-every", "8")[1] == "deleted step 4\n"
    assert command(capsys, "prune", str(tmp_path), "--keep-every", "-1")[0] == 2
    assert list(manifest.checkpoints(tmp_path / "checkpoint")) == [8, 10]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("place", ["alone", "nested"])
def test_a_malicious_checkpoint_runs_nothing(place: str, data: Path, copy: Path, tmp_path: Path) -> None:
    sentinel, folder = tmp_path / "ran", runs.checkpoint(copy, 10)
    payload: Any = Evil(sentinel) if place == "alone" else {"a": [1, {"b": Evil(sentinel)}]}
    pickle.loads(pickle.dumps(payload))  # the bait works
    assert sentinel.exists()
    sentinel.unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(payload))
    (folder / manifest.NAME).unlink()
    final = folder.rename(folder.with_name("step-11"))
    manifest.publish(final, folder)  # whoever can write the pickle can write the manifest
    with pytest.raises(CheckpointError, match=r"refused global posix.system"):
        runs.run(data, copy)
    assert not sentinel.exists()


def test_a_pickle_inside_a_shard_runs_nothing(data: Path, copy: Path, tmp_path: Path) -> None:
    """Tensors are stored by torch.save, one after another; here a pickle replaces one."""
    folder, sentinel = runs.checkpoint(copy, 10), tmp_path / "ran"
    metadata = safe_unpickle.load_metadata((folder / ".metadata").read_bytes())
    torch.save(Evil(sentinel), tmp_path / "evil.pt")
    payload = (tmp_path / "evil.pt").read_bytes()
    for info in (metadata.storage_data or {}).values():
        info.offset, info.length = 0, len(payload)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    shard(copy, 10).write_bytes(payload)
    (folder / manifest.NAME).unlink()
    manifest.publish(folder.rename(folder.with_name("step-11")), folder)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        runs.run(data, copy)
    assert not sentinel.exists()


def rewritten(folder: Path, name: str, content: str) -> None:
    """A checkpoint with another content of one file, and a manifest of that."""
    (folder / name).write_text(content)
    (folder / manifest.NAME).unlink()
    temporary = folder.rename(folder.with_name("being-written"))
    manifest.publish(temporary, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "10"),
        ("step", True),
        ("tokens_seen", float("nan")),
        ("tokens_seen", -1),
        ("elapsed_seconds", "long"),
        ("world_size", None),
        ("data", []),
        ("data", {"next_sample": -5}),
        ("data", {"next_sample": "x"}),
    ],
)
def test_state_of_the_wrong_kind_is_refused_by_name(data: Path, copy: Path, key: str, value: Any) -> None:
    folder = runs.checkpoint(copy, 10)
    state = json.loads((folder / "state.json").read_text())
    rewritten(folder, "state.json", json.dumps(state | {key: value}))
    with pytest.raises(CheckpointError, match=re.escape(f"its state.json has {key} {value!r}")):
        runs.run(data, copy)


def test_a_checkpoint_with_another_steps_name_is_refused(data: Path, copy: Path) -> None:
    """A run would go on from it again and again, as it stays the newest."""
    folder = runs.checkpoint(copy, 5)
    folder.rename(folder.with_name("step-50"))
    with pytest.raises(CheckpointError, match=r"of step 5 by its state\.json, and of step 50 by its name"):
        runs.run(data, copy)


def test_a_checkpoints_config_has_tables(data: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(runs.checkpoint(copy, 10), "config.toml", "model = 3\n")
    with pytest.raises(CheckpointError, match=r"model in its config\.toml is no table"):
        runs.run(data, copy)
    status, _, said = command(capsys, "export", str(copy), "--out", str(copy / "weights.safetensors"))
    assert status == 4 and "model in its config.toml is no table" in said


def test_prune_deletes_nothing_elsewhere(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a run directory from somebody else may have it in its config."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("../run/checkpoint", str(copy / "checkpoint")):
        (other / "config.toml").write_text(f'[checkpoint]\nfolder = "{name}"\n')
        status, _, said = command(capsys, "prune", str(other), "--keep", "1")
        assert status == 2 and f"elsewhere, in {other / name}" in said
    assert runs.checkpoint(copy, 5).is_dir()


ALLOWED = [(module, name) for module, names in safe_unpickle._ALLOWED.items() for name in names]


@pytest.mark.parametrize(("module", "name"), [*ALLOWED, ("torch", "float32")], ids=lambda word: word)
def test_a_pickle_changes_nothing_that_it_names(module: str, name: str) -> None:
    """Opcode BUILD sets attributes of what is on the stack: of a class, that would be for the whole process."""
    named = f"c{module}\n{name}\n".encode()
    if module == "pathlib._local" and sys.version_info < (3, 13):
        return  # there is no such module here
    real = getattr(importlib.import_module(module), name)
    before = dict(vars(real)) if hasattr(real, "__dict__") else {}
    for state in (b"N}(X\x04\x00\x00\x00nameNu\x86", b"}(X\x04\x00\x00\x00nameNu"):  # by setattr, and in __dict__
        with pytest.raises(pickle.UnpicklingError, match=r"refused to change|damaged"):
            safe_unpickle.load_metadata(b"\x80\x02" + named + state + b"b.")
    assert before == (dict(vars(real)) if hasattr(real, "__dict__") else {})


def test_a_pickle_changes_no_member_of_an_enumeration() -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    member = _MEM_FORMAT_ENCODING(0)
    named = f"c{type(member).__module__}\n_MEM_FORMAT_ENCODING\n".encode()
    change = b"K\x00\x85R" + b"N}(X\x07\x00\x00\x00_value_K\x07u\x86b."
    with pytest.raises(pickle.UnpicklingError, match="not a checkpoint's metadata"):
        safe_unpickle.load_metadata(b"\x80\x02" + named + change)
    assert member.value == 0 and _MEM_FORMAT_ENCODING(0) is member


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_is_read_as_it_was_written(copy: Path, protocol: int) -> None:
    content = (runs.checkpoint(copy, 10) / ".metadata").read_bytes()
    real: Any = pickle.loads(content)
    read: Any = safe_unpickle.load_metadata(pickle.dumps(real, protocol))
    assert read.state_dict_metadata == real.state_dict_metadata and read.storage_data == real.storage_data
    assert {type(entry.properties) for entry in read.state_dict_metadata.values()} == {TensorProperties}


def _second_half(entry: TensorStorageMetadata) -> None:
    entry.chunks[0].offsets = torch.Size([entry.size[0] // 2, *entry.size[1:]])


def _half(entry: TensorStorageMetadata) -> None:
    entry.chunks[0].sizes = torch.Size([entry.size[0] // 2, *entry.size[1:]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.chunks.clear(), "whose pieces are not the whole"),
        (_half, "whose pieces are not the whole"),
        (_second_half, "whose pieces are not the whole"),
        (lambda entry: entry.chunks.append(entry.chunks[0]), "whose pieces are not the whole"),
        (lambda entry: setattr(entry, "chunks", None), "damaged: TypeError"),
        (lambda entry: setattr(entry, "size", torch.Size([-1])), "whose size or dtype is none"),
        (lambda entry: setattr(entry, "size", (32,)), "whose size or dtype is none"),
        (lambda entry: setattr(entry, "properties", None), "whose size or dtype is none"),
        (lambda entry: setattr(entry.properties, "dtype", "float32"), "whose size or dtype is none"),
    ],
)
def test_metadata_with_holes_or_of_no_tensor_is_refused(copy: Path, change: Callable[[Any], None], words: str) -> None:
    """Nothing would be written there, so a model would get what was in memory."""
    folder = runs.checkpoint(copy, 10)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata.state_dict_metadata["model.norm.weight"])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=words):
        runs.tensors(folder)


@pytest.mark.parametrize("place", ["../x", "/x", 7])
def test_metadata_with_places_elsewhere_is_refused(copy: Path, place: Any) -> None:
    metadata = pickle.loads((runs.checkpoint(copy, 10) / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = place
    with pytest.raises(pickle.UnpicklingError, match="refused a file outside the checkpoint"):
        safe_unpickle.load_metadata(pickle.dumps(metadata))
    metadata.storage_data = dict.fromkeys(metadata.storage_data, place)
    with pytest.raises(pickle.UnpicklingError, match="which is none"):
        safe_unpickle.load_metadata(pickle.dumps(metadata))


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.serialization.load", "torch.hub"])
def test_the_allow_list_has_no_such_name(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    content = b"c" + f"{module}\n{attribute}\n".encode() + b"."
    with pytest.raises(pickle.UnpicklingError, match=f"refused global {name}"):
        safe_unpickle.load_metadata(content)


def test_extra_missing_and_recast_tensors_are_refused(copy: Path) -> None:
    folder = runs.checkpoint(copy, 10)
    right = runs.tensors(folder)
    check_tensors(right, folder)
    name = "model.norm.weight"
    with pytest.raises(CheckpointError, match=f"{name} is in the checkpoint and not in the run"):
        check_tensors({key: value for key, value in right.items() if key != name}, folder)
    with pytest.raises(CheckpointError, match=r"model.extra is missing"):
        check_tensors({**right, "model.extra": torch.zeros(1)}, folder)
    with pytest.raises(CheckpointError, match=f"{name} is torch.float32 there and torch.bfloat16 here"):
        check_tensors({**right, name: right[name].bfloat16()}, folder)
    with pytest.raises(CheckpointError, match=rf"{name} is \[32\] there and \[33\] here"):
        check_tensors({**right, name: torch.zeros(33)}, folder)
    metadata = safe_unpickle.load_metadata((folder / ".metadata").read_bytes())
    for key in [key for key in metadata.state_dict_metadata if key.startswith("optimizer.")]:
        del metadata.state_dict_metadata[key]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"no optimizer state.*begin with its weights by --checkpoint\.initial"):
        check_tensors(right, folder)
    check_tensors({key: value for key, value in right.items() if key.startswith("model.")}, folder)
    with pytest.raises(CheckpointError, match=r"of another model: model.extra is missing \["):
        check_tensors({**right, "model.extra": torch.zeros(1)}, folder)


def test_names_that_are_not_ours_are_neither_loaded_nor_deleted(data: Path, finished: Path, copy: Path) -> None:
    folder = copy / "checkpoint"
    foreign = ["backup-step-100", "step-99x", "step-007", "step-1.5", "Step-8", "superseded-1-step-9"]
    for name in foreign:
        shutil.copytree(runs.checkpoint(finished, 10), folder / name)
    (folder / "step-3").mkdir()  # ours by name, but nothing that we have written
    (folder / "step-3" / "notes.txt").write_text("precious")
    runs.run(data, copy, checkpoint__keep_latest_k=1, training__steps=13, checkpoint__interval=1)
    left = {path.name for path in folder.iterdir()}
    assert left == {*foreign, "step-3", "step-13"}
    assert (folder / "step-3" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("there", [True, False], ids=["a link", "a link to nowhere"])
def test_a_checkpoint_that_is_a_link_is_refused(
    there: bool, data: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when checkpoints were moved to a larger disk and linked back; the run would start again at step 0."""
    folder, larger = copy / "checkpoint", tmp_path / "larger"
    larger.mkdir()
    for step in (5, 10):
        moved = runs.checkpoint(copy, step).rename(larger / f"step-{step}")
        runs.checkpoint(copy, step).symlink_to(moved if there else tmp_path / "nowhere")
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"symbolic link is not read: step-5, step-10 .*name where they are with"):
        runs.run(data, copy, training__steps=11)
    assert (copy / "metrics.jsonl").read_bytes() == before
    for action in ("list", "verify", "prune"):
        status, _, said = command(capsys, action, str(copy))
        assert status == 4 and "symbolic link is not read: step-5, step-10" in said
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-5"]
    runs.run(data, copy, training__steps=11, checkpoint__folder=larger)
    assert list(runs.losses(copy)) == list(range(1, 12)), "as the refusal says"


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    data: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, kept = (copy / "metrics.jsonl").read_bytes(), (copy / "checkpoint").rename(copy / "kept")
    for steps in (10, 12):
        with pytest.raises(CheckpointError, match=r"has saved .*step-10, and there is no checkpoint .*restore it"):
            runs.run(data, copy, training__steps=steps)
    assert (copy / "metrics.jsonl").read_bytes() == before
    assert not (copy / "checkpoint").exists(), "it may be the place of a disk that is not mounted"
    (copy / "last_saved.txt").unlink()
    (copy / "metrics.jsonl").rename(copy / "aside")
    runs.run(data, copy, training__steps=10)
    shutil.rmtree(copy / "checkpoint")
    (copy / "aside").rename(copy / "metrics.jsonl")
    kept.rename(copy / "checkpoint")
    runs.run(data, copy, training__steps=11)
    assert list(runs.losses(copy)) == list(range(1, 12))
    shutil.rmtree(copy / "checkpoint")
    runs.run(data, copy, training__steps=2, checkpoint__enable=False)
    assert "metrics.jsonl of an earlier start is now metrics-until-11.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["before its save", "in its save", "with steps left out"])
def test_a_run_that_ended_before_it_had_a_checkpoint_begins_again(
    ends: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever step it had reached, and whatever its config said and says."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if ends == "with steps left out":
            patch.setattr(loop, "clip_gradients", lambda *_: torch.tensor(math.nan))
        else:
            patch.setattr(
                loop.Run if ends == "before its save" else manifest,
                "save" if ends == "before its save" else "publish",
                fail,
            )
        with pytest.raises((OSError, TitanFastError)):
            runs.run(data, tmp_path, training__steps=4, checkpoint__interval=2, training__on_nonfinite="skip",
                     training__max_skipped_steps=3)  # fmt: skip
    assert (tmp_path / "metrics.jsonl").read_text() and not (tmp_path / "last_saved.txt").exists()
    assert "\nfailed  " in (said := capsys.readouterr().out) and "\nfinished  " not in said
    runs.run(data, tmp_path, training__steps=2, checkpoint__interval=1)
    assert "\nfinished  " in capsys.readouterr().out
    assert list(runs.losses(tmp_path)) == [1, 2] and len(list(tmp_path.glob("metrics-until-*.jsonl"))) == 1


def test_prune_is_not_kept_off_by_a_run_in_a_folder_above(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock(tmp_path):
        assert command(capsys, "prune", str(copy), "--keep", "1")[:2] == (0, "deleted step 5\n")
    with RunLock(copy):
        status, _, said = command(capsys, "prune", str(copy), "--keep", "1")
    assert status == 2 and "another run is using these checkpoints" in said


def test_an_older_checkpoint_may_be_a_link(data: Path, copy: Path, tmp_path: Path) -> None:
    moved = runs.checkpoint(copy, 5).rename(tmp_path / "cold")
    runs.checkpoint(copy, 5).symlink_to(moved)
    runs.run(data, copy, training__steps=11)
    assert list(runs.losses(copy)) == list(range(1, 12)) and runs.checkpoint(copy, 5).is_symlink()


def test_a_manifest_of_a_later_format_is_refused_without_assertions_too(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / manifest.NAME).write_text(json.dumps({"format": manifest.FORMAT + 1, "files": {}}))
    done = subprocess.run(
        [sys.executable, "-O", "-m", "titan_fast.checkpoint", "verify", str(tmp_path)],
        capture_output=True, text=True, timeout=100, env=runs.environment(),
    )  # fmt: skip
    assert done.returncode == 4 and f"DAMAGED: {manifest.NAME} is damaged" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["/etc/passwd", "../state.json", "a/../../b"])
def test_a_manifest_names_no_file_outside(name: str, tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text(json.dumps({"format": manifest.FORMAT, "files": {name: [1, "a"]}}))
    with pytest.raises(ValueError, match="outside the folder"):
        manifest.read(tmp_path)


def test_retention_counts_only_whole_checkpoints(tmp_path: Path, data: Path, finished: Path) -> None:
    for step in range(1, 7):
        shutil.copytree(runs.checkpoint(finished, 10), tmp_path / f"step-{step}")
    for step in (5, 6):
        (tmp_path / f"step-{step}" / "state.json").unlink()
    assert manifest.prune(tmp_path, 2) == ([1, 2], [])
    assert list(manifest.checkpoints(tmp_path)) == [3, 4, 5, 6]
    assert manifest.prune(tmp_path, 0) == ([], [])
    state = tmp_path / "step-4" / "state.json"
    state.write_bytes(state.read_bytes().swapcase())  # of the same size
    assert manifest.prune(tmp_path, 1) == ([], []), "the last whole one"
    assert manifest.prune(tmp_path, 1, contents=False, damaged={4}) == ([], [])
    assert manifest.prune(tmp_path, 1, always=3, contents=False) == ([], [])
    assert manifest.prune(tmp_path, 1, contents=False) == ([3], [])


def test_retention_does_not_count_what_the_start_passed_over(data: Path, copy: Path) -> None:
    flip_a_bit(copy)
    more = {"checkpoint__keep_latest_k": 2, "checkpoint__interval": 4, "training__steps": 8}
    runs.run(data, copy, **more)
    assert list(manifest.checkpoints(copy / "checkpoint")) == [5, 8, 10]
    runs.run(data, copy, **more | {"training__steps": 10})
    assert list(manifest.checkpoints(copy / "checkpoint")) == [8, 10], "written anew, it counts"


def test_what_cannot_be_deleted_is_said(
    data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a checkpoint that its owner has made read-only."""
    folder = copy / "checkpoint"
    doomed = folder / ".deleting-step-5"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        assert command(capsys, "prune", str(copy), "--keep", "1")[1] == f"could not delete {doomed}\n"
        words = "could not delete .deleting-step-5, which was on its way out\n"
        assert command(capsys, "prune", str(copy), "--keep", "1")[1] == words
        shutil.copytree(runs.checkpoint(copy, 10), runs.checkpoint(copy, 5))
        runs.run(data, copy, training__steps=11, checkpoint__keep_latest_k=1)
        assert f"could not delete {doomed}" in capsys.readouterr().out, "the run goes on"
        assert runs.checkpoint(copy, 5).exists() and runs.checkpoint(copy, 11).exists()
    shutil.rmtree(folder / ".deleting-step-10")
    assert manifest.leftover_bytes(folder) > 0
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(doomed))
    assert manifest.leftover_bytes(folder) == 0, "room that does not come free"


def test_an_old_checkpoint_that_cannot_be_renamed_ends_nothing(
    data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as an immutable one. The others are deleted."""
    true_rename = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "step-5":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(self))
        return true_rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    runs.run(data, copy, training__steps=11, checkpoint__keep_latest_k=1)
    assert list(manifest.checkpoints(copy / "checkpoint")) == [5, 11]
    assert f"could not delete {copy / 'checkpoint' / 'step-5'}\n" in capsys.readouterr().out


def test_an_undeletable_leftover_gives_its_name_free(
    data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise that step could never be saved."""
    left = copy / "checkpoint" / ".writing-step-11"
    left.mkdir()
    true_rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, *a, **k: None if "step-11" in str(path) else true_rmtree(path))
    runs.run(data, copy, training__steps=11)
    assert "could not delete .writing-step-11, which was never finished" in capsys.readouterr().out
    assert manifest.problem(runs.checkpoint(copy, 11)) is None
    assert not left.exists() and left.with_name(".deleting-step-11").exists()


def test_what_a_kill_left_half_done_is_cleaned(tmp_path: Path, finished: Path) -> None:
    whole = runs.checkpoint(finished, 10)
    for name in (".writing-step-4", ".deleting-step-1", ".replaced-step-10", ".replaced-step-5", "step-5", ".mine"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / ".writing-step-4" / manifest.NAME).unlink()
    shutil.copytree(tmp_path / ".writing-step-4", tmp_path / ".replaced-step-7")  # damaged: nothing to go on from
    said = manifest.clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-5", ".mine"}
    assert manifest.problem(tmp_path / "step-10") is None
    assert len(said) == 5 and "put back step-10" in said[1], said


def test_a_repeated_step_replaces_the_old_folder_whole(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        (tmp_path / ".writing-step-1").mkdir()
        (tmp_path / ".writing-step-1" / "a").write_bytes(content)
        manifest.publish(tmp_path / ".writing-step-1", tmp_path / "step-1", step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert (tmp_path / "step-1" / "a").read_bytes() == b"second"
    assert manifest.problem(tmp_path / "step-1") is None


def test_what_other_ranks_wrote_must_be_there_and_may_show_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary, content = tmp_path / ".writing-step-1", b"a shard"
    temporary.mkdir()
    known = {"__1_0.distcp": manifest.Digest(len(content), hashlib.sha256(content).hexdigest())}
    for there in (None, content[:-1]):
        if there is not None:
            (temporary / "__1_0.distcp").write_bytes(there)
        monkeypatch.setattr(manifest, "LATE_SECONDS", 0.0)
        with pytest.raises(CheckpointError, match=r"__1_0\.distcp, .* not in rank 0's folder .* one shared folder"):
            manifest.publish(temporary, tmp_path / "step-1", known, step=1)
        assert [path.name for path in tmp_path.iterdir()] == [temporary.name]
    monkeypatch.setattr(manifest, "LATE_SECONDS", 60.0)
    monkeypatch.setattr(manifest.time, "sleep", lambda _: (temporary / "__1_0.distcp").write_bytes(content))
    manifest.publish(temporary, tmp_path / "step-1", known, step=1)
    assert manifest.problem(tmp_path / "step-1") is None


def test_parameters_that_are_not_finite_are_never_published(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        outcome = true_step(self, number)
        if number == 7:
            with torch.no_grad():
                self.model.norm.weight[3] = float("nan")
        return outcome

    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(NumericsError, match=r"model.norm.weight is not finite after step 7"):
        runs.run(data, tmp_path / "run", checkpoint__interval=7)
    assert not list((tmp_path / "run" / "checkpoint").glob("step-*"))


def test_a_full_disk_is_foreseen(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    runs.run(data, tmp_path / "run", training__steps=5)
    true_train = loop.Run.train

    def train(self: loop.Run) -> None:  # there was room at the start
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 4096, 4096))
        true_train(self)

    monkeypatch.setattr(loop.Run, "train", train)
    with pytest.raises(CheckpointError, match=r"disk full.*needs [\d,]+ bytes, has 4,096 bytes free") as caught:
        runs.run(data, tmp_path / "run")
    assert str(tmp_path / "run" / "checkpoint") in str(caught.value)
    assert "newest whole checkpoint is of step 5" in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-5"] or (
        manifest.problem(runs.checkpoint(tmp_path / "run", 5)) is None
    )


def test_a_run_that_could_not_save_does_not_begin(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, asked = namedtuple("usage", "total used free"), []
    true_begin = checkpointer.Checkpointer._begin

    def begin(self: checkpointer.Checkpointer, temporary: Path, need: int) -> None:
        asked.append(need)
        true_begin(self, temporary, need)

    monkeypatch.setattr(checkpointer.Checkpointer, "_begin", begin)
    runs.run(data, tmp_path / "saved", training__steps=1)
    run, free = tmp_path / "run", asked[0] // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    words = r"a checkpoint of this model needs ([\d,]+) bytes, and the disk has"
    with pytest.raises(CheckpointError, match=words) as caught:
        runs.run(data, run)
    found = re.search(words, caught.value.what)
    assert found is not None
    need = int(found[1].replace(",", ""))
    assert 0.95 * asked[0] < need <= asked[0], "random states and the like are not foreseen"
    assert not (run / "train.log").exists() and not list((run / "checkpoint").iterdir())
    killed = run / "checkpoint" / ".writing-step-7"  # whose room comes back
    killed.mkdir()
    (killed / "__0_0.distcp").write_bytes(bytes(need - free))
    config = parse(runs.arguments(data, run, training__steps=1))
    assert not checkpointer.check_start(config, run, 12)
    with pytest.raises(CheckpointError, match=r"bytes free and [\d,]+ more in what a killed save has left"):
        checkpointer.check_start(config, run, 13)
    killed.rename(killed.with_name(".replaced-step-7"))  # is put back
    with pytest.raises(CheckpointError, match=r"bytes free \[.*; make room or choose another --job\.dump_folder"):
        checkpointer.check_start(config, run, 12)
    shutil.copytree(runs.checkpoint(tmp_path / "saved", 1), run / "checkpoint" / "step-1")
    assert not checkpointer.check_start(config, run, 12)  # the run is at its end
    (run / "checkpoint" / "step-1" / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="bytes free"):
        checkpointer.check_start(config, run, 12)
    elsewhere = parse(runs.arguments(data, run, checkpoint__folder=tmp_path / "saves"))
    (tmp_path / "saves").mkdir()
    with pytest.raises(CheckpointError, match=r"another --checkpoint\.folder"):
        checkpointer.check_start(elsewhere, run, 12)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"checkpoint__load_step": 5}, 3),  # one of four is there
        ({"checkpoint__load_step": 5, "checkpoint__keep_latest_k": 1}, 1),
        ({}, 2),
        ({"training__steps": 15}, 1),  # has one save to come
        ({"training__steps": 15, "checkpoint__interval_minutes": 1}, 2),
        ({"training__steps": 10, "checkpoint__interval_minutes": 1}, 0),
        ({"checkpoint__keep_latest_k": 0}, 19),
        ({"checkpoint__keep_every": 20}, 2 + 5),  # 20, 40, 60, 80, 100
        ({"checkpoint__keep_every": 10}, 3 + 9),  # 10 makes no room any more; 20 to 100
        ({"checkpoint__keep_every": 10, "training__steps": 19}, 2),
        ({"checkpoint__keep_latest_k": 0, "checkpoint__interval": 0}, 1),
    ],
)
def test_room_for_all_that_is_kept_is_warned_of(
    options: dict[str, Any], more: int, data: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(runs.arguments(data, copy, **{"training__steps": 101} | options))
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    need = parameter_count(model_shape(config.model)) * 12 + checkpointer._SPARE_BYTES
    free[0] = more * need
    assert not checkpointer.check_start(config, copy, 12)
    if more > 1:
        free[0] -= 1
        (said,) = checkpointer.check_start(config, copy, 12)
        assert f"has {free[0]:,} bytes free, and the run will need {more * need:,} for {more} checkpoints more" in said


def test_a_start_says_that_the_disk_may_fill_up(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 10**6))
    runs.run(data, tmp_path, training__steps=2, checkpoint__interval=1)
    assert "WARNING: the disk has 2,000,000 bytes free, and the run will need" in capsys.readouterr().out


def test_a_file_system_without_fsync_is_no_failing_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as some in user space. A failing disk is not passed over."""
    raised = [errno.EINVAL]

    def fsync(descriptor: int) -> None:
        raise OSError(raised[0], os.strerror(raised[0]))

    monkeypatch.setattr(os, "fsync", fsync)
    runs.run(data, tmp_path, training__steps=1)
    assert manifest.problem(runs.checkpoint(tmp_path, 1)) is None
    raised[0] = errno.EIO
    with pytest.raises(CheckpointError, match="could not be written"):
        runs.run(data, tmp_path, training__steps=2)


def failing_save(monkeypatch: pytest.MonkeyPatch, failures: int) -> list[int]:
    """The first `failures` publications after the first one raise ENOSPC; returns the calls' list."""
    true_publish, calls = manifest.publish, []

    def publish(*args: Any, **kwargs: Any) -> None:
        calls.append(kwargs["step"])
        if 1 < len(calls) <= 1 + failures:
            raise OSError(errno.ENOSPC, "No space left on device")
        true_publish(*args, **kwargs)

    monkeypatch.setattr(manifest, "publish", publish)
    return calls


def test_failed_saves_are_tolerated_as_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"checkpoint__interval": 2, "checkpoint__on_save_error": "continue", "checkpoint__max_failed_saves": 2}
    failing_save(monkeypatch, 2)
    runs.run(data, tmp_path / "a", **more)
    assert list(manifest.checkpoints(tmp_path / "a" / "checkpoint")) == [2, 8, 10]
    assert not list((tmp_path / "a" / "checkpoint").glob(".writing-*")), "half a save takes room from the next"
    assert "disk full" in capsys.readouterr().out
    monkeypatch.undo()
    failing_save(monkeypatch, 3)
    with pytest.raises(CheckpointError, match="disk full"):
        runs.run(data, tmp_path / "b", **more)
    assert list(manifest.checkpoints(tmp_path / "b" / "checkpoint")) == [2]
    monkeypatch.undo()
    failing_save(monkeypatch, 1)
    with pytest.raises(CheckpointError, match="disk full"):
        runs.run(data, tmp_path / "c", checkpoint__interval=2)


def test_failed_saves_count_in_a_row(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_publish, steps = manifest.publish, []

    def publish(*args: Any, **kwargs: Any) -> None:
        steps.append(kwargs["step"])
        if kwargs["step"] in (4, 8):
            raise OSError(errno.ENOSPC, "No space left on device")
        true_publish(*args, **kwargs)

    monkeypatch.setattr(manifest, "publish", publish)
    more = {"checkpoint__interval": 2, "checkpoint__on_save_error": "continue", "checkpoint__max_failed_saves": 1}
    runs.run(data, tmp_path, **more)
    assert steps == [2, 4, 6, 8, 10] and list(manifest.checkpoints(tmp_path / "checkpoint")) == [2, 6, 10]


def test_a_folder_that_cannot_be_listed_is_a_failed_save(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one on a file server that is briefly unavailable, to the save and to the message about it."""
    true_checkpoints, true_write = manifest.checkpoints, manifest.write_file
    away: list[int] = []

    def checkpoints(folder: Path) -> dict[int, Path]:
        if away:
            raise OSError(errno.ESTALE, "Stale file handle", str(folder))
        return true_checkpoints(folder)

    def write(path: Path, content: bytes) -> None:
        away[:] = [4] if "step-4" in str(path) else []
        if away:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        true_write(path, content)

    monkeypatch.setattr(manifest, "checkpoints", checkpoints)
    monkeypatch.setattr(manifest, "write_file", write)
    more = {"checkpoint__interval": 2, "checkpoint__on_save_error": "continue"}
    true_prune = manifest.prune

    def prune(parent: Path, keep: int, every: int, always: int, **more: Any) -> Any:
        if always == 8:
            raise OSError(errno.ESTALE, "Stale file handle")
        return true_prune(parent, keep, every, always, **more)

    monkeypatch.setattr(manifest, "prune", prune)
    runs.run(data, tmp_path, **more)
    away.clear()
    assert list(manifest.checkpoints(tmp_path / "checkpoint")) == [6, 8, 10]
    said = " ".join(capsys.readouterr().out.split())
    assert "what checkpoints there are cannot be read: Stale file handle" in said
    assert "WARNING: what older checkpoints there are cannot be read: Stale file handle" in said


def test_the_newest_step_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: dict[int, str | None] = {}
    monkeypatch.setattr(manifest, "checkpoints", lambda folder: dict.fromkeys(problems, folder))
    monkeypatch.setattr(manifest, "problem", lambda folder, contents: list(problems.values())[next(turn)])
    saver = SimpleNamespace(folder=tmp_path)
    unread, damaged = manifest.Unread("state.json: Permission denied"), "state.json: 2 bytes"
    for found, words in (
        ({}, "there is no checkpoint yet"),
        ({2: damaged}, "there is no checkpoint yet"),
        ({2: None, 4: damaged, 6: unread}, "the newest whole checkpoint is of step 2"),
        ({2: damaged, 4: unread}, "that of step 4 cannot be read"),
    ):
        problems.clear()
        problems.update(found)
        turn = iter(range(len(found)))
        assert checkpointer.Checkpointer._newest(saver) == words  # type: ignore[arg-type]


def test_a_write_that_failed_is_told_in_the_disks_words(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in torch's, which fails when it closes the file."""

    def refuse(*_: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904

    monkeypatch.setattr(checkpointer.dcp.FileSystemWriter, "write_data", refuse)
    with pytest.raises(CheckpointError, match=r"No space left on device: needs [\d,]+ bytes"):
        runs.run(data, tmp_path)


def test_a_file_may_be_flushed_once_more_than_it_is_open(tmp_path: Path) -> None:
    """By torch, when it forgets the stream; from Python 3.13 on a user would see the error."""
    writer = checkpointer.Writer(tmp_path, sync_files=False)
    with writer.fs.create_stream(tmp_path / "file", "wb") as stream:
        stream.write(b"tensor")  # pyright: ignore[reportAttributeAccessIssue]
    stream.flush()
    assert stream.closed and (tmp_path / "file").read_bytes() == b"tensor"


@pytest.mark.parametrize("stager", ["lasting", "closed after each use"])  # the latter is torch 2.11's
def test_an_async_save_holds_the_values_of_its_step(
    stager: str, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_write, true_stage = checkpointer.Checkpointer._write_tensors, checkpointer.DefaultStager.stage

    def stage_once(self: Any, tensors: Any) -> Any:
        staged = true_stage(self, tensors)
        self.close()
        return staged

    if stager == "closed after each use":
        monkeypatch.setattr(checkpointer.DefaultStager, "stage", stage_once)

    true_step, went_on = loop.Run.step, threading.Event()

    def slow(self: Any, *args: Any) -> None:
        assert went_on.wait(60), "the run waits for its save"
        true_write(self, *args)

    def stepped(self: loop.Run, number: int) -> Any:
        if number == 8:  # steps ahead of the save of step 5
            went_on.set()
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", stepped)
    monkeypatch.setattr(checkpointer.Checkpointer, "_write_tensors", slow)
    runs.run(data, tmp_path / "run", checkpoint__async_mode="async")
    for step in (5, 10):
        runs.assert_same_tensors(runs.checkpoint(tmp_path / "run", step), runs.checkpoint(finished, step))
    stalls = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(record for record in stalls if record["step"] == 6)["checkpoint_stall_seconds"] > 0


def test_an_async_save_waits_for_the_one_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose copies are in the memory that it is about to use."""
    true_save, true_staged = checkpointer.Checkpointer.save, checkpointer.Checkpointer._staged
    true_write, saves, staging, writing = checkpointer.Checkpointer._write_tensors, [0], threading.Event(), [False]
    second = threading.Event()

    def save(self: Any, *args: Any) -> None:
        saves[0] += 1
        if saves[0] == 2:
            second.set()
        true_save(self, *args)

    def staged(self: Any, tensors: Any) -> Any:
        assert not writing[0]
        staging.set()
        return true_staged(self, tensors)

    def write(self: Any, *args: Any) -> None:
        writing[0] = True
        assert second.wait(60)
        staging.clear()
        staging.wait(0.5)
        true_write(self, *args)
        writing[0] = False

    monkeypatch.setattr(checkpointer.Checkpointer, "save", save)
    monkeypatch.setattr(checkpointer.Checkpointer, "_staged", staged)
    monkeypatch.setattr(checkpointer.Checkpointer, "_write_tensors", write)
    runs.run(data, tmp_path, checkpoint__async_mode="async")
    assert saves == [2]


def test_the_watchdog_names_a_hanging_save_before_its_collective_ends(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_group, given = distributed.new_group, []

    def new_group(comm: Any, timeout: timedelta) -> Any:
        given.append(timeout.total_seconds())
        return true_group(comm, timeout)

    monkeypatch.setattr(distributed, "new_group", new_group)
    runs.run(data, tmp_path, training__steps=1, checkpoint__save_timeout_seconds=77)
    assert 77 + distributed.SPARE_SECONDS in given


def test_a_failed_async_save_surfaces_at_the_next_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_save(monkeypatch, 1)
    true_step, ran = loop.Run.step, []

    def step(self: loop.Run, number: int) -> Any:
        if (pending := self.checkpointer._pending) is not None:
            pending.exception()  # until it has ended
        ran.append(number)
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    with pytest.raises(CheckpointError, match="disk full") as caught:
        runs.run(data, tmp_path / "run", checkpoint__async_mode="async", checkpoint__interval=3)
    assert ran[-1] == 7, "step 6 was saved, and the failure is seen in the step after it"
    assert caught.value.exit_status == 4


@pytest.mark.parametrize("on_save_error", ["abort", "continue"])
def test_a_last_async_save_that_fails_is_no_success(
    on_save_error: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_save(monkeypatch, 1)
    more = {"checkpoint__async_mode": "async", "checkpoint__interval": 5, "checkpoint__on_save_error": on_save_error}
    with pytest.raises(CheckpointError, match="disk full"):
        runs.run(data, tmp_path / "run", **more)


def test_pinned_memory_needs_cuda(data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(TitanFastError, match="async_with_pinned_mem' needs CUDA"):
        runs.run(data, tmp_path / "run", checkpoint__async_mode="async_with_pinned_mem")


def test_saving_by_the_clock(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
    true_step = loop.Run.step

    def step(self: loop.Run, number: int) -> Any:
        now[0] += 40.0
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", step)
    runs.run(
        data, tmp_path / "run", checkpoint__interval=0, checkpoint__interval_minutes=2, checkpoint__keep_latest_k=0
    )
    assert list(manifest.checkpoints(tmp_path / "run" / "checkpoint")) == [3, 6, 9, 10]


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `python -m titan_fast.checkpoint`."""
    status = 0
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["titan_fast.checkpoint", *words])
            checkpoint_command.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def elsewhere(copy: Path) -> Path:
    """The run, with its checkpoints in another folder, as checkpoint.folder names it."""
    (copy / "checkpoint").rename(copy / "kept")
    config = copy / "config.toml"
    config.write_text(config.read_text().replace('folder = "checkpoint"', 'folder = "kept"'))
    return copy


def test_weights_are_found_in_another_folder(copy: Path) -> None:
    assert checkpoint_folder(elsewhere(copy)) == copy / "kept" / "step-10"


def test_the_command_line(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys, "list", str(copy))
    assert status == 0 and out.count("640 tokens") == 1 and "step       10" in out
    assert command(capsys, "export", str(copy), "--out", str(tmp_path / "w.safetensors"))[0] == 0
    (tmp_path / "any file").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any file").stat().st_mode
    weights, saved = safetensors.torch.load_file(tmp_path / "w.safetensors"), runs.tensors(runs.checkpoint(copy, 10))
    assert {f"model.{name}" for name in weights} == {name for name in saved if name.startswith("model.")}
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in weights.items())
    status, _, err = command(capsys, "export", str(copy), "--out", str(tmp_path / "nowhere" / "w.safetensors"))
    assert status == 4 and err.startswith("titan_fast: cannot write: ")
    assert command(capsys, "export", str(copy), "--out", "/dev/null/x")[0] == 4
    odd = shutil.copytree(runs.checkpoint(copy, 5), tmp_path / "odd")
    (odd / "state.json").write_text(
        (odd / "state.json").read_text().replace('"tokens_seen": 320', '"tokens_seen": "x"')
    )
    manifest.publish(odd, runs.checkpoint(copy, 7), step=7, world_size=1)
    status, out, _ = command(capsys, "list", str(copy))
    assert status == 0 and "its state.json cannot be read" in out and "640 tokens" in out
    shutil.rmtree(runs.checkpoint(copy, 7))
    flip_a_bit(copy)
    status, out, err = command(capsys, "verify", str(copy))
    assert status == 4 and "DAMAGED: __0_0.distcp: sha256 mismatch" in out
    assert "titan_fast: a checkpoint is damaged" in err
    nothing = command(capsys, "prune", str(copy), "--keep", "1")[1]  # for the newest is damaged
    assert nothing == "nothing to delete: no more than 1 whole checkpoints\n"
    shutil.copytree(runs.checkpoint(copy, 5), runs.checkpoint(copy, 12))
    assert command(capsys, "prune", str(copy), "--keep", "1")[1] == "deleted step 5\ndeleted step 10\n"
    assert command(capsys, "list", str(tmp_path / "nothing"))[0] == 4
    assert command(capsys, "list", str(elsewhere(copy)))[0] == 0
    help_ = subprocess.run(
        [sys.executable, "-m", "titan_fast.checkpoint", "--help"],
        capture_output=True, text=True, timeout=100, env=runs.environment(),
    )  # fmt: skip
    assert help_.returncode == 0 and "verify" in help_.stdout


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_run_deletes_meanwhile_is_not_called_damaged(
    when: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_problem = manifest.problem

    def problem(folder: Path, *args: Any, **options: Any) -> str | None:
        if folder.name == "step-5" and when == "before":
            manifest.delete(folder)
        found = true_problem(folder, *args, **options)
        if folder.name == "step-5" and when == "after":
            manifest.delete(folder)
        return found

    shutil.copytree(copy, copy.with_name("another"))
    monkeypatch.setattr(manifest, "problem", problem)
    assert checkpoint_command.list_lines(copy)[0] == "step        5  deleted meanwhile"
    lines, problems = checkpoint_command.verify(copy.with_name("another"))
    assert problems == [] and lines[0].endswith("deleted meanwhile" if when == "before" else "whole")


def test_no_secret_reaches_what_a_run_leaves(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hunter2hunter2"
    description = f"from s3://me:{secret}@bucket/x?api_key={secret}"
    runs.run(data, tmp_path / "run", job__description=description, training__steps=2, metrics__enable_tensorboard=True)
    runs.run(data, tmp_path / "run", job__description=description, training__steps=3)  # a masked config resumes
    left = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in left)
    assert [path for path in left if secret.encode() in path.read_bytes()] == []
    assert secret not in "".join(capsys.readouterr())


def test_every_data_parallel_rank_gets_its_own_position_back() -> None:
    ranks = [{"rank": rank, "position": 10 * rank} for rank in range(3)]
    for rank in range(3):
        assert own_data_state({"ranks": ranks}, rank, 3) == ranks[rank]
    assert own_data_state({"position": 5}, 2, 3) == {"position": 5}, "one position for all"
    assert own_data_state(ranks[0], 0, 1) == ranks[0], "saved by one process"
    for saved, state in ((3, {"ranks": ranks}), (1, ranks[0])):
        with pytest.raises(CheckpointError, match=rf"of {saved} data-parallel ranks.* has 2"):
            own_data_state(state, 0, 2)


# Two ranks


def room_asked_for(world: World, replicate: int, folder: Path) -> int:
    """The room that a save needs if `replicate` ranks hold the same."""
    ways = {"data_parallel_replicate_degree": replicate, "data_parallel_shard_degree": world.size // replicate}
    config = parse(runs.arguments(folder, folder, **{f"parallelism__{key}": value for key, value in ways.items()}))
    degrees = mesh_degrees(config.parallelism, world.size)
    model = build_model(config, model_shape(config.model), REFERENCE, degrees, world.device)
    tokenizer = SimpleNamespace(path=folder / "tokenizer.model", kind="sentencepiece")
    tokenizer.path.touch()
    saving = checkpointer.Checkpointer(config, folder, world, cast(Any, tokenizer))
    asked = []
    for name, function in {
        "_begin": lambda temporary, need: asked.append(need), "_write_tensors": lambda *_: None,
        "_write_files": lambda *_: {}, "_publish": lambda *_: None,
    }.items():  # fmt: skip
        setattr(saving, name, function)
    saving._write(tensors_of(model, build_optimizer(model, config.optimizer)), {}, 1)
    return asked[0] - checkpointer._SPARE_BYTES


def sampled(world: World) -> str:
    """A text sampled by ranks that disagree about its tokens."""
    generate.next_token = lambda logits, *_: torch.full((len(logits), 1), 65 + world.rank)
    shape = ModelShape(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=128, max_seq_len=16)
    model = Llama(shape)
    init_weights(model, 0)
    eos_of_rank_1 = cast(Any, SimpleNamespace(
        bos_id=None, eos_id=66, vocab_size=128, encode=lambda text: list(text.encode()), decode=lambda ids: bytes(ids),
    ))  # fmt: skip
    return generate.generate_text(model, eos_of_rank_1, "x", 5, generate.Sampling(), world.device)


def refused_to_share(world: World, run_dirs: list[Path]) -> tuple[str, list[str]]:
    """The error of ranks with these run directories, and what is left in this rank's folder of checkpoints."""
    own = run_dirs[world.rank] / "checkpoint"
    own.mkdir(parents=True, exist_ok=True)
    manifest.LATE_SECONDS = 0.0
    config = parse(runs.arguments(own, own.parent))
    saving = checkpointer.Checkpointer(config, own.parent, world, cast(Any, None))
    said = ""
    try:
        saving._check_shared()
    except CheckpointError as error:
        said = str(error)
    world.barrier()
    return said, [path.name for path in own.iterdir()]


def saving_model(world: World, folder: Path) -> tuple[checkpointer.Checkpointer, Llama, torch.optim.Optimizer]:
    folder.mkdir(exist_ok=True)
    config = parse(runs.arguments(folder, folder, parallelism__data_parallel_shard_degree=world.size))
    model = build_model(
        config, model_shape(config.model), REFERENCE, mesh_degrees(config.parallelism, world.size), world.device
    )
    init_weights(model, 0)
    tokenizer = SimpleNamespace(files={"tokenizer.model": b""}, path=folder, kind="sentencepiece", fingerprint="")
    saving = checkpointer.Checkpointer(config, folder, world, cast(Any, tokenizer))
    return saving, model, build_optimizer(model, config.optimizer)


def drawn(world: World, folder: Path) -> tuple[float, float]:
    """What this rank draws after a save, and again after that is loaded."""
    saving, model, optimizer = saving_model(world, folder)
    torch.manual_seed(world.rank)
    saving.save(model, optimizer, Progress(1, 0, 0.0, {}), must_succeed=True)
    first = torch.rand(()).item()
    saving.load(model, optimizer)
    return first, torch.rand(()).item()


def gathered(world: World) -> dict[str, Any]:
    """A stream's position as it is saved if the data-parallel ranks are in the opposite order."""
    return gather_data_state({"rank": world.size - 1 - world.rank, "position": world.rank}, world)


def refused_infinity(world: World, folder: Path) -> str:
    """The error of a save on this rank if only the last rank has an infinity."""
    saving, model, optimizer = saving_model(world, folder)
    if world.rank == world.size - 1:
        local(model.norm.weight.detach())[0] = float("inf")
    local(model.embedding.weight.detach()).fill_(-1e30)  # whose norm is not finite
    with pytest.raises(NumericsError) as caught:
        saving.save(model, optimizer, Progress(1, 0, 0.0, {}), must_succeed=True)
    return str(caught.value)


def test_two_ranks(tmp_path: Path) -> None:
    tasks = [
        Task("drawn", drawn, (tmp_path / "drawn",)),
        Task("infinity", refused_infinity, (tmp_path / "infinity",)),
        Task("gathered", gathered),
        Task("sharded", room_asked_for, (1, tmp_path)),
        Task("replicated", room_asked_for, (2, tmp_path)),
        Task("sampled", sampled),
        Task("shared", refused_to_share, ([tmp_path / "one"] * 2,)),
        Task("apart", refused_to_share, ([tmp_path / "a", tmp_path / "b"],)),
    ]
    found = run_world(2, tasks, tmp_path / "world")
    sharded, replicated = results(found, "sharded"), results(found, "replicated")
    assert sharded == pytest.approx(replicated, rel=0.01) and sharded[0] > 100_000, "a replica is written once"
    (one, one_again), (other, other_again) = results(found, "drawn")
    assert (one, other) == (one_again, other_again) and one != other, "each rank's random state is its own"
    positions = {"ranks": [{"rank": 0, "position": 1}, {"rank": 1, "position": 0}]}
    assert results(found, "gathered") == [positions] * 2
    assert all("model.norm.weight is not finite after step 1" in text for text in results(found, "infinity"))
    assert results(found, "sampled") == [b"xAAAAA"] * 2
    assert results(found, "shared") == [("", [])] * 2
    said = f"rank 1 does not see in {tmp_path}/b/checkpoint what rank 0 has written in {tmp_path}/a/checkpoint"
    assert all(text.startswith(said) and not left for text, left in results(found, "apart"))


def test_export_does_not_go_back_for_what_it_cannot_read(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_problem = manifest.problem
    unread = manifest.Unread("state.json: Permission denied")
    monkeypatch.setattr(
        manifest,
        "problem",
        lambda folder, *a, **k: unread if folder.name == "step-10" else true_problem(folder, *a, **k),
    )
    status, _, said = command(capsys, "export", str(finished), "--out", str(tmp_path / "w.safetensors"))
    assert status == 4 and "it cannot be read: state.json: Permission denied" in said and "step-10" in said
    assert not list(tmp_path.iterdir())
    for which in ("step-5",):
        folder = finished / "checkpoint" / which
        assert command(capsys, "export", str(folder), "--out", str(tmp_path / "w.safetensors"))[0] == 0
