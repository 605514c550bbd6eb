"""Converts Hugging Face's or Meta's folders to checkpoints, and checkpoints to Hugging Face's folders.

Both work tensor by tensor, so no more than one tensor or one file of the model is in memory.
"""

import json
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from titan_fast import manifest
from titan_fast.checkpoint import Writer, cause, tokenizer_of
from titan_fast.config import Config, model_of, to_dict
from titan_fast.errors import CheckpointError
from titan_fast.flavors import ModelShape
from titan_fast.hf import Weights, hf_config, hf_names, hf_sizes, our_sizes, read_parameter, to_hf
from titan_fast.hf_files import CONFIG, read_json, write_shards
from titan_fast.hf_tokenizer import write_tokenizer
from titan_fast.initial_weights import CheckpointWeights, checkpoint_folder, foreign_weights
from titan_fast.tokenizer import (
    CONFIG_BESIDE,
    NAMES_IN_FOLDER,
    Tokenizer,
    check_vocabulary,
    copy_tokenizer,
    load_tokenizer,
)

KEPT = "hf"
"""The folder in an imported checkpoint with the source's own small files, which an export writes again."""

GENERATION = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", CONFIG_BESIDE, "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
_SPARE_BYTES = 2**20


def import_model(folder: Path, out: Path, tokenizer_path: Path | None = None) -> list[str]:
    """Writes `out`/step-0 with the weights in `folder`, in their own dtypes, and returns lines that say what was done.

    Raises what reading raises, and CheckpointError if step-0 exists or writing fails.
    """
    weights = foreign_weights(folder)
    if weights is None:
        raise CheckpointError("neither config.json nor params.json is there", "give a model's folder", str(folder))
    if (folder / GENERATION).is_file():
        read_json(folder / GENERATION)  # an export reads its copy in the checkpoint, where it could not be fixed
    tokenizer = _find_tokenizer(folder, tokenizer_path)
    if tokenizer is not None:
        check_vocabulary(tokenizer, weights.shape.vocab_size)
    final = manifest.folder_of(out, 0)
    _refuse_name(out)
    if final.exists():
        raise CheckpointError("there is a checkpoint already", "choose another --out", str(final))
    need = sum(size.numel() * weights.dtype(name).itemsize for name, size in hf_sizes(weights.shape).items())
    with _written(final, manifest.writing(final), need) as temporary:
        _write_dcp(weights, temporary)
        _write_small_files(weights.shape, temporary)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, temporary / "tokenizer")
        _keep_files(folder, temporary / KEPT, with_tokenizer=tokenizer_path is None)
        manifest.publish(temporary, final, step=0, world_size=1)
    return _import_lines(final, weights, tokenizer)


class _SourcePlanner(DefaultSavePlanner):
    """Reads each tensor when DCP is about to write it. The tensors that DCP plans with have no memory."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return read_parameter(self.weights, write_item.index.fqn.removeprefix("model."))


def _write_dcp(weights: Weights, folder: Path) -> None:
    tensors = {
        f"model.{name}": torch.empty(size, dtype=weights.dtype(hf_names(name)[0]), device="meta")
        for name, size in our_sizes(weights.shape).items()
    }
    # A file per tensor, because DCP holds a file's tensors until it is written.
    writer = Writer(folder, single_file_per_rank=False, sync_files=False, overwrite=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(tensors, storage_writer=writer, planner=_SourcePlanner(weights), no_dist=True)
    except dcp.api.CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, CheckpointError):  # of the source, not of the disk
                raise failure from None
        raise


def _write_small_files(shape: ModelShape, folder: Path) -> None:
    config = replace(Config(), model=model_of(shape))
    config = replace(config, training=replace(config.training, seq_len=min(config.training.seq_len, shape.max_seq_len)))
    state = {"step": 0, "tokens_seen": 0, "elapsed_seconds": 0.0, "data": {}, "world_size": 1}
    (folder / "state.json").write_text(json.dumps(state | {"torch": torch.__version__}, indent=1))
    (folder / "config.toml").write_text(tomli_w.dumps(to_dict(config)))


def _keep_files(source: Path, folder: Path, with_tokenizer: bool) -> None:
    """Copies what an export could not make again; tokenizer files only with the config that transformers needs."""
    names = [GENERATION]
    if with_tokenizer and (source / CONFIG_BESIDE).is_file():
        names += _TOKENIZER_FILES
    for name in names:
        if (source / name).is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _find_tokenizer(folder: Path, given: Path | None) -> Tokenizer | None:
    if given is not None:
        return load_tokenizer(given)
    return load_tokenizer(folder) if any((folder / name).is_file() for name in NAMES_IN_FOLDER) else None


def _import_lines(final: Path, weights: Weights, tokenizer: Tokenizer | None) -> list[str]:
    shape, table = weights.shape, to_dict(replace(Config(), model=model_of(weights.shape)))["model"]
    arguments = " ".join(f"--model.{key} {_words(value)}" for key, value in table.items())
    if tokenizer is None:
        spoken = "no tokenizer, so it can only be trained and exported; --tokenizer names one"
    else:
        spoken = f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} pieces"
        arguments += f" --model.tokenizer_path {shlex.quote(str(final / 'tokenizer'))}"
    dtypes = {weights.dtype(name) for name in hf_sizes(shape)}
    return [
        f"wrote {final}: {_described(shape, dtypes)}",
        spoken,
        f"train from it: {arguments} --checkpoint.initial_load_path {shlex.quote(str(final))}",
    ]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _described(shape: ModelShape, dtypes: set[torch.dtype]) -> str:
    count = sum(size.numel() for size in our_sizes(shape).values())
    return f"{count:,} parameters, {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"


def export_checkpoint(path: Path, out: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> list[str]:
    """Writes a checkpoint as a Hugging Face folder, in `dtype` or (None) its own; returns lines that say what was done.

    CheckpointError if the checkpoint is not whole, `out` exists, or writing fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError("it already exists", "choose another --out", str(out))
    _refuse_name(out)
    weights = CheckpointWeights(checkpoint_folder(path))
    shape, before = weights.shape, set(weights.dtypes.values())
    after = before if dtype is None else {dtype}
    sizes = _hf_bytes(weights, dtype)
    with _written(out, out.with_name(f".writing-{out.name}"), sum(sizes.values())) as temporary:
        tensors = ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in to_hf(weights, shape))
        files = write_shards(tensors, sizes, temporary, max_shard_bytes)
        spoken = _write_configs(weights, after, temporary)
        for file in temporary.iterdir():
            manifest.sync_file(file)
        manifest.sync_folder(temporary)
        temporary.rename(out)
        manifest.sync_folder(out.parent)
    changed = "" if after == before else f", converted from {_described(shape, before).partition(', ')[2]}"
    return [f"wrote {out}: {_described(shape, after)}{changed}, in {len(files)} file(s) of weights", spoken]


def _hf_bytes(weights: CheckpointWeights, dtype: torch.dtype | None) -> dict[str, int]:
    """The bytes of each of Hugging Face's tensors, in the order in which ours are read."""
    numbers = {name: size.numel() for name, size in hf_sizes(weights.shape).items()}
    widths = {name: (dtype or own).itemsize for name, own in weights.dtypes.items()}
    return {theirs: numbers[theirs] * widths[name] for name in weights for theirs in hf_names(name)}


def _write_configs(weights: CheckpointWeights, dtypes: set[torch.dtype], folder: Path) -> str:
    """Writes config.json, generation_config.json and the tokenizer; says what became of the tokenizer."""
    config = hf_config(weights.shape) | {"bos_token_id": None, "eos_token_id": None}
    generation: dict[str, Any] = {}
    has_tokenizer = (weights.path / "tokenizer").is_dir()
    if has_tokenizer:
        tokenizer = load_tokenizer(tokenizer_of(weights.path))
        generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    names = (GENERATION, *_TOKENIZER_FILES)
    kept = {name: file for name in names if (file := weights.path / KEPT / name).is_file()}
    if GENERATION in kept:
        generation = read_json(kept[GENERATION])
    if CONFIG_BESIDE in kept:
        spoken = "tokenizer: the files that it was imported with"
    elif has_tokenizer:
        spoken = write_tokenizer(tokenizer, folder, weights.shape.max_seq_len)
    else:
        spoken = "no tokenizer: the checkpoint has none"
    config |= {key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation}
    if generation:
        _write_json(folder / GENERATION, generation)
    for name, file in kept.items():
        shutil.copyfile(file, folder / name)
    if len(dtypes) == 1:  # transformers 5 reads the old name too
        config["torch_dtype"] = str(next(iter(dtypes))).removeprefix("torch.")
    _write_json(folder / CONFIG, config)
    return spoken


def _refuse_name(out: Path) -> None:
    if manifest.would_be_taken_for_one(out):
        raise CheckpointError("beside checkpoints it would be taken for one", "choose another --out", str(out))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


@contextmanager
def _written(final: Path, temporary: Path, need: int) -> Iterator[Path]:
    """An empty folder to write into, removed if that fails. Disk space is checked first."""
    if checkpoint := manifest.holding(final.parent):
        raise CheckpointError("nothing may be added to a checkpoint", "choose another --out", str(checkpoint))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < need + _SPARE_BYTES:
            raise CheckpointError(f"needs {need:,} bytes, has {free:,} bytes free", "make room", str(final.parent))
        yield temporary
    except (OSError, dcp.api.CheckpointException, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be written: {cause(error)}", "make room or choose another --out", str(final)
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
