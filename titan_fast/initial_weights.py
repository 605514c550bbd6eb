"""Weights for a model from a checkpoint of ours, a Hugging Face folder, or Meta's files.

Each process reads its own part of each tensor, one tensor after another. They communicate only about errors.
"""

import pickle
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from titan_fast import manifest
from titan_fast.checkpoint import cause, check_tensors, checkpoints_of, read_config, read_state, saved_tensors
from titan_fast.config import from_dict, model_shape
from titan_fast.errors import CheckpointError, TitanFastError
from titan_fast.flavors import ModelShape
from titan_fast.hf import Weights, hf_names, our_sizes, read_parameter
from titan_fast.hf_files import CONFIG, HuggingFaceFolder
from titan_fast.meta_files import PARAMS, MetaFolder
from titan_fast.model import Llama
from titan_fast.safe_unpickle import SafeReader
from titan_fast.shards import local, window
from titan_fast.tokenizer import NAMES_IN_FOLDER, Tokenizer, is_same, load_tokenizer

# A change of these changes what the same weights compute. The other fields of a shape, besides max_seq_len, decide
# sizes.
_SAME_SIZES = ("rope_theta", "rope_scaling", "norm_eps")


def foreign_weights(path: Path) -> Weights | None:
    """The weights in a folder of Hugging Face's or of Meta's; None when it is neither."""
    if (path / CONFIG).is_file():
        return HuggingFaceFolder(path)
    return MetaFolder(path) if (path / PARAMS).is_file() else None


def checkpoint_folder(path: Path, part: tuple[int, int] | None = (0, 1)) -> Path:
    """The checkpoint at `path`: `path` itself if it is a step-N folder, or the newest in a run directory or checkpoint
    folder. CheckpointError where there is none, or it does not match its manifest. `part` (i, n): this process is the
    i-th of n that share the hashing; None: only names and sizes are compared."""
    candidates = [path] if (path / "state.json").is_file() else list(checkpoints_of(path).values())
    if not candidates:
        raise CheckpointError("no checkpoint here", "give a run directory or one of its step-N folders", str(path))
    newest = candidates[-1]
    if reason := manifest.problem(newest, contents=part is not None, part=part or (0, 1)):
        raise CheckpointError(
            f"the checkpoint is not loaded ({reason})", "restore it from a copy or name an older one", str(newest)
        )
    return newest


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint of ours, by our names in the model's order. Each is read when it is accessed."""

    def __init__(self, path: Path) -> None:
        """CheckpointError where it cannot be read, or its tensors do not match its own config."""
        self.path = path
        self.shape = model_shape(from_dict(read_config(path)).model)
        self._reader = _CachedReader(path)
        saved = saved_tensors(path)
        self.dtypes: dict[str, torch.dtype] = {
            name: saved[f"model.{name}"].properties.dtype for name in self if f"model.{name}" in saved
        }
        expected = {
            f"model.{name}": torch.empty(size, dtype=self.dtypes.get(name), device="meta")
            for name, size in our_sizes(self.shape).items()
        }
        check_tensors(expected, path)

    def __iter__(self) -> Iterator[str]:
        return iter(our_sizes(self.shape))

    def __len__(self) -> int:
        return len(our_sizes(self.shape))

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(our_sizes(self.shape)[name], dtype=self.dtypes[name])
        self.fill({name: tensor})
        return tensor

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills `tensors`, whole or sharded, by our names. Values are converted to the tensor's dtype."""
        wanted = {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(wanted, storage_reader=self._reader, no_dist=True)
        except (dcp.api.CheckpointException, RuntimeError, ValueError, OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"cannot be loaded: {cause(error)}", "use another", str(self.path)) from error


class _CachedReader(SafeReader):
    """Reads .metadata once, however many tensors are then asked for one by one."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def check_initial_weights(path: Path, shape: ModelShape, allow_changes: bool, names_tokenizer: bool) -> None:
    """CheckpointError where `load_initial_weights` would refuse, as far as names, configs and headers show, and where
    weights that came with a tokenizer would be trained with a new one. For one process, before there is a model."""
    weights = _open(path, part=None)
    _compare_shapes(weights, shape, allow_changes)
    folder = _tokenizer_folder(weights)
    if folder is not None and not names_tokenizer and not _was_trained_by_run(weights):
        raise CheckpointError(
            "these weights came with a tokenizer, and without model.tokenizer_path a new one would be trained, to "
            "which they mean nothing",
            f"add --model.tokenizer_path {shlex.quote(str(folder))}",
            str(path),
        )


def _tokenizer_folder(weights: Weights | CheckpointWeights) -> Path | None:
    """The folder of the tokenizer that came with the weights, if one did."""
    folder = weights.path / "tokenizer" if isinstance(weights, CheckpointWeights) else weights.path
    return folder if any((folder / name).is_file() for name in NAMES_IN_FOLDER) else None


def _was_trained_by_run(weights: Weights | CheckpointWeights) -> bool:
    """Whether a run trained the tokenizer on its text, as another run on the same text would do again."""
    if not isinstance(weights, CheckpointWeights):
        return False
    is_imported = read_state(weights.path)["tokens_seen"] == 0
    return not is_imported and read_config(weights.path)["model"].get("tokenizer_path") is None


@torch.no_grad()
def load_initial_weights(
    model: Llama, path: Path, shape: ModelShape, allow_changes: bool = False, tokenizer: Tokenizer | None = None
) -> str:
    """Fills the model, sharded or whole. Returns a description of the weights, with a warning if they came with another
    tokenizer than `tokenizer`. Every rank calls it.

    CheckpointError on every rank where the weights are damaged, incomplete, of other sizes, not finite, of a dtype
    whose values the model's dtype cannot hold, or made for another rotary embedding or norm epsilon (`allow_changes`
    accepts the last)."""
    with _raised_together():
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        weights = _open(path, (rank, size))
        changes = _compare_shapes(weights, shape, allow_changes)
        _check_dtypes(weights, model)
    with _raised_together():
        dtypes = _fill(model, weights)
    words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    said = f"weights from {weights.path}, {words}" + (f"; other than there: {', '.join(changes)}" if changes else "")
    return said + _other_tokenizer(weights, tokenizer)


def _other_tokenizer(weights: Weights | CheckpointWeights, tokenizer: Tokenizer | None) -> str:
    """A warning if a tokenizer came with the weights and another one is in use; else ""."""
    folder = _tokenizer_folder(weights)
    if tokenizer is None or folder is None:
        return ""
    try:
        same = is_same(load_tokenizer(folder), tokenizer)
    except TitanFastError:
        same = False
    if same:
        return ""
    return (
        f"\nWARNING: these weights came with another tokenizer than {tokenizer.path}, to which they may mean nothing; "
        f"--model.tokenizer_path {shlex.quote(str(folder))} takes theirs"
    )


def _open(path: Path, part: tuple[int, int] | None) -> Weights | CheckpointWeights:
    """part: see `checkpoint_folder`."""
    if not path.is_dir():
        raise CheckpointError("there is no such folder", "change checkpoint.initial_load_path", str(path))
    try:
        return foreign_weights(path) or CheckpointWeights(checkpoint_folder(path, part))
    except ValueError as error:  # a config that is no shape of ours
        what = f"its config is none of this project's: {error}"
        raise CheckpointError(what, "change checkpoint.initial_load_path", str(path)) from error


def _compare_shapes(weights: Weights | CheckpointWeights, shape: ModelShape, allow_changes: bool) -> list[str]:
    """The differences that are accepted, in words; CheckpointError for those that are not."""
    there, here = vars(weights.shape), vars(shape)
    differing = [name for name in there if there[name] != here[name] and name != "max_seq_len"]
    words = {name: f"{name} is {there[name]} there and {here[name]} here" for name in differing}
    sizes = [name for name in differing if name not in _SAME_SIZES]
    if sizes or (differing and not allow_changes):
        accept = "" if sizes else ", or accept it by --checkpoint.initial_load_changes True"
        raise CheckpointError(
            f"the weights are of another model: {'; '.join(words.values())}",
            f"change [model]{accept}",
            str(weights.path),
        )
    return list(words.values())


def _check_dtypes(weights: Weights | CheckpointWeights, model: Llama) -> None:
    for name, parameter in model.named_parameters():
        dtype = _dtype(weights, name)
        if torch.promote_types(dtype, parameter.dtype) != parameter.dtype:
            raise CheckpointError(
                f"{name} is {dtype} there and {parameter.dtype} here, which cannot hold every value",
                "convert the weights first: python -m titan_fast.hf export STEP_FOLDER --out DIR "
                f"--dtype {str(parameter.dtype).removeprefix('torch.')} does that for a checkpoint",
                str(weights.path),
            )


def _dtype(weights: Weights | CheckpointWeights, name: str) -> torch.dtype:
    if isinstance(weights, CheckpointWeights):
        return weights.dtypes[name]
    return weights.dtype(hf_names(name)[0])


def _fill(model: Llama, weights: Weights | CheckpointWeights) -> set[torch.dtype]:
    """Fills the model and returns the dtypes that the weights had."""
    if isinstance(weights, CheckpointWeights):
        weights.fill(dict(model.named_parameters()))
        return set(weights.dtypes.values())
    dtypes = set()
    for name, parameter in model.named_parameters():
        own = local(parameter)
        if own.numel():  # an uneven sharding may leave a rank nothing
            part = read_parameter(weights, name, window(parameter))
            own.copy_(part)
            dtypes.add(part.dtype)
    return dtypes


@contextmanager
def _raised_together() -> Iterator[None]:
    """If any rank has a CheckpointError inside, raises the first one on every rank, so that none waits for a rank that
    has stopped."""
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as caught:
        error = caught
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    if first := next((each for each in errors if each is not None), None):
        raise first
