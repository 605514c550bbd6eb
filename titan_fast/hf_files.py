"""Hugging Face's folders: config.json and safetensors, read piece by piece and written shard by shard.

Nothing is unpickled, and nothing outside the folder is read.
"""

import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titan_fast.errors import CheckpointError
from titan_fast.flavors import ModelShape
from titan_fast.hf import Window, hf_sizes, shape_from_hf

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Constants that follow from config.json, but which old versions of transformers saved with the weights.
_DERIVED = "rotary_emb.inv_freq"


class HuggingFaceFolder:
    """A folder with config.json and safetensors: one file, or several with an index. Opening it reads all headers and
    compares them with the shape; weights are only read by `read`."""

    def __init__(self, path: Path) -> None:
        """ConfigError for a config.json that this project cannot represent, CheckpointError if something is missing,
        superfluous, of another size or damaged."""
        self.path = path
        self.config = read_json(path / CONFIG)
        self.shape = shape_from_hf(self.config, str(path / CONFIG))
        sizes, self._dtypes, self._files = self._headers()
        check_sizes(sizes, self.shape, path)
        if self.shape.tied and "lm_head.weight" in sizes:
            self._check_tied()

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, window: Window) -> Tensor:
        # Opened for each tensor, because what was read of a file counts as this process's memory while it is mapped.
        with _opened(self._files[name]) as file:
            return file.get_slice(name)[window]

    def _headers(self) -> tuple[dict[str, torch.Size], dict[str, torch.dtype], dict[str, Path]]:
        index = self._index()
        sizes: dict[str, torch.Size] = {}
        dtypes: dict[str, torch.dtype] = {}
        files: dict[str, Path] = {}
        for file in sorted(set(index.values())) if index else [SINGLE]:
            with _opened(self.path / file) as opened:
                names = [name for name in opened.keys() if not name.endswith(_DERIVED)]  # noqa: SIM118
                for name in names:
                    if name in files:
                        raise CheckpointError(
                            f"{name} is in {files[name].name} and in {file}", "remove one", str(self.path)
                        )
                    part = opened.get_slice(name)
                    sizes[name] = torch.Size(part.get_shape())
                    dtypes[name] = self._known_dtype(name, part.get_dtype())
                    files[name] = self.path / file
            if absent := [name for name, at in index.items() if at == file and name not in names]:
                raise CheckpointError(
                    f"{INDEX} says that {some(absent)} is in {file}, which has no such tensor",
                    "get the folder again",
                    where=str(self.path),
                )
        return sizes, dtypes, files

    def _index(self) -> dict[str, str]:
        """Tensor -> file; empty if there is one file without an index."""
        if not (self.path / INDEX).is_file():
            if not (self.path / SINGLE).is_file():
                pickled = any(self.path.glob("*.bin"))
                raise CheckpointError(
                    f"neither {SINGLE} nor {INDEX} is there" + (", only pickled *.bin files" if pickled else ""),
                    "save the model as safetensors" if pickled else "give a folder of weights",
                    where=str(self.path),
                )
            return {}
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise CheckpointError("weight_map is not a table of tensors and files", "fix it", str(self.path / INDEX))
        for name, file in index.items():
            if Path(file).name != file:
                raise CheckpointError(
                    f"{name} should be in {file!r}, which is not a plain file name", "fix it", str(self.path / INDEX)
                )
            if not (self.path / file).is_file():
                raise CheckpointError(
                    f"{name} should be in {file}, and there is no such file",
                    "get the folder again",
                    str(self.path / INDEX),
                )
        return {name: file for name, file in index.items() if not name.endswith(_DERIVED)}

    def _known_dtype(self, name: str, dtype: str) -> torch.dtype:
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{name} is {dtype}, not one of {', '.join(_DTYPES)}", "use unquantized weights", where=str(self.path)
            )
        return _DTYPES[dtype]

    def _check_tied(self) -> None:
        names = "model.embed_tokens.weight", "lm_head.weight"
        window = slice(0, self.shape.vocab_size), slice(0, self.shape.dim)
        if not torch.equal(*(self.read(name, window) for name in names)):
            raise CheckpointError(
                f"tie_word_embeddings is true, and {names[1]} differs from {names[0]}",
                "set it to false or remove the tensor",
                where=str(self.path),
            )


def check_sizes(sizes: Mapping[str, torch.Size], shape: ModelShape, path: Path) -> None:
    """CheckpointError, with names and sizes, unless the tensors are exactly those of the shape."""
    expected = hf_sizes(shape)
    given = {name for name in sizes if not (shape.tied and name == "lm_head.weight")}
    problems = []
    if missing := [name for name in expected if name not in given]:
        problems.append(f"{some(missing)} missing")
    if extra := sorted(given - expected.keys()):
        problems.append(f"{some(extra)} unknown to this model")
    different = [name for name in expected if name in given and sizes[name] != expected[name]]
    if different:
        name = different[0]
        words = f"{some(different)} of another size than the config's"
        problems.append(f"{words}: {list(sizes[name])}, not {list(expected[name])}")
    if problems:
        raise CheckpointError("; ".join(problems), "give weights and a config that belong together", where=str(path))


def some(names: list[str]) -> str:
    """The first three names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or CheckpointError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name}", "give a folder that has one", where=str(path.parent)
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", "fix it", where=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", "fix it", where=str(path))
    return content


def _opened(path: Path) -> Any:
    """`safe_open`, which checks the header and the file's length against it."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: it cannot be mapped
        raise CheckpointError(f"damaged or not safetensors: {error}", "get the file again", where=str(path)) from error


def write_shards(
    weights: Iterable[tuple[str, Tensor]], sizes: Mapping[str, int], folder: Path, max_shard_bytes: int
) -> list[Path]:
    """Writes the tensors in their order to safetensors files of at most `max_shard_bytes` (a larger tensor gets its own
    file), and an index if there are several. `sizes`: the bytes of each. Holds the tensors of one file at a time."""
    plan = plan_shards(sizes, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(plan):05}.safetensors" for i in range(1, len(plan) + 1)]
    paths = [folder / name for name in (names if len(plan) > 1 else [SINGLE])]
    tensors = iter(weights)
    for path, group in zip(paths, plan, strict=True):
        _write_shard(path, group, tensors)
    if len(paths) > 1:
        index = {name: path.name for path, group in zip(paths, plan, strict=True) for name in group}
        metadata = {"total_size": sum(sizes.values())}
        (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": index}, indent=2) + "\n")
    return paths


def _write_shard(path: Path, names: list[str], tensors: Iterator[tuple[str, Tensor]]) -> None:
    shard = {}
    for expected in names:
        name, tensor = next(tensors)
        assert name == expected, (name, expected)
        shard[name] = tensor
    save_readable(shard, path, {"format": "pt"})  # transformers refuses a file without this


def save_readable(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes safetensors with the usual permissions of a new file; `save_file` lets only the owner read it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(stat.S_IMODE(mode))


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """The names of each file, in order."""
    plan: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not plan or held + size > max_shard_bytes:
            plan.append([])
            held = 0
        plan[-1].append(name)
        held += size
    return plan
