"""Token shards: documents tokenized once into memory-mapped files, and an order of samples over them.

A folder holds `tokens-NNNNN.bin` (little-endian uint16 or uint32, documents one after another, each BOS, text, EOS),
`offsets.bin` (int64, where each document begins), `origins.bin` (the file and line of each), a copy of the tokenizer,
and `index.json`. It is written under another name, by one process at a time, and then renamed, so a folder with the
right name is whole.
"""

import ctypes
import errno
import hashlib
import itertools
import json
import logging
import math
import mmap
import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from titan_fast.corpus import Document, RowLedger
from titan_fast.errors import NO_ROOM, ConfigError, DataError
from titan_fast.manifest import obstacle, sha256, sync_file, sync_folder, would_be_taken_for_one
from titan_fast.run_lock import RunLock
from titan_fast.tokenizer import Tokenizer, available_processors, copy_tokenizer

log = logging.getLogger(__name__)

FORMAT = "titan_fast tokens"
FORMAT_VERSION = 1
SHARD_TOKENS = 2**28
"""The most tokens of a shard, unless a single document has more."""
VERIFIED_BYTES = 64 * 2**30
"""Up to this size the shards' sha256 is checked at start (about a second per 1.5 GB and core); beyond it only sizes."""
_MOST_MAPPED = 16384  # shards; a process may have 65,530 mappings on Linux
_BATCH_CHARACTERS = 2_000_000  # tokenized together: enough work for every core in little memory
_BATCH_DOCUMENTS = 4096
_LENGTHS_TOGETHER = 2**20
_FETCHED_TOGETHER = 64  # parts of documents, each of which may keep a shard mapped
_WILL_NEED, _POPULATE_READ = 3, 22  # Linux's advice
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MOST_OFTEN = 1000.0  # the largest weight of a part
_SECONDS_BETWEEN_LINES = 10.0
_TOKENIZER_KEYS = ("dtype", "vocab_size", "bos_id", "eos_id", "tokenizer")
_INDEX: dict[str, type] = {
    "documents": int, "tokens": int, "dtype": str, "vocab_size": int, "eos_id": int, "tokenizer": str,
    "fingerprint": str, "source": dict, "rows": dict, "shards": list, "files": list, "sizes": dict, "sha256": dict,
}  # fmt: skip
_ORIGIN = np.dtype([("file", "<u4"), ("line", "<u8")])


def is_prepared(path: Path) -> bool:
    """Whether the folder holds token shards."""
    try:
        return json.loads((path / "index.json").read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def prepare(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, *, source: dict[str, Any], ledger: RowLedger
) -> dict[str, Any]:
    """Writes `folder` and returns its index. `source` says what the documents are, for the index.

    DataError when there is no document, when the disk is full, or when the folder holds something already; ConfigError
    while another process writes it.
    """
    return _publish(folder, lambda temporary: _write(documents, tokenizer, temporary, source, ledger))


def join(parts: Sequence[Path], folder: Path, weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Writes `folder` with the documents of folders of token shards, one after another, and returns its index. On the
    same file system the shards are hard links, which take no room and outlive their part. weights: how often an epoch
    of training has each part's documents (None: once); see `mixed`. Errors as for `prepare`, DataError where the parts
    do not belong together, ConfigError where the weights are not one positive number for each."""
    if weights is not None and len(weights) != len(parts):
        raise ConfigError(f"{len(weights)} weights for {len(parts)} parts", "give one for each")
    if wrong := [weight for weight in weights or () if not (math.isfinite(weight) and 0 < weight <= _MOST_OFTEN)]:
        raise ConfigError(f"a weight is {wrong[0]:g}", f"give numbers above 0 and at most {_MOST_OFTEN:g}")
    opened = [PreparedTokens(part) for part in parts]
    first = opened[0]
    for tokens in opened[1:]:
        for key in _TOKENIZER_KEYS:
            if tokens.index[key] != first.index[key]:
                raise DataError(
                    f"{key} is {first.index[key]} in {first.folder} and {tokens.index[key]} here",
                    "prepare all parts with one tokenizer",
                    str(tokens.folder),
                )
    by_fingerprint: dict[str, Path] = {}
    for tokens in opened:
        if twin := by_fingerprint.get(tokens.fingerprint):
            raise DataError(f"{twin} has the same documents", "name each part once", str(tokens.folder))
        by_fingerprint[tokens.fingerprint] = tokens.folder
    of_parts = zip(opened, weights or [1.0] * len(opened), strict=True)
    often = max((own["weight"] * weight for part, weight in of_parts for own in part.mixture), default=0.0)
    if often > _MOST_OFTEN:
        what = f"{often:g} is the weight of a part of a part"
        raise ConfigError(what, f"give weights with which it is at most {_MOST_OFTEN:g}")
    return _publish(folder, lambda temporary: _join(opened, temporary, weights))


def _publish(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Lets `write` fill a folder beside `folder`, which then gets its name."""
    check_empty(folder)
    beside = folder.with_name(f".{folder.name}.tmp")
    temporary = beside / "shards"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        with RunLock(beside, "the folder for the token shards"):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                index = write(temporary)
                for path in (path for path in temporary.rglob("*") if path.is_file()):
                    sync_file(path)
                sync_folder(temporary)
                temporary.rename(folder)
                sync_folder(folder.parent)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        full = error.errno in NO_ROOM and folder.parent.is_dir()
        free = f" ({shutil.disk_usage(folder.parent).free / 2**30:.2f} GiB free)" if full else ""
        raise DataError(
            f"cannot write the token shards: {error.strerror or error}{free}",
            "make room or name another folder" if full else "name another folder",
            str(folder),
        ) from error
    return index


def check_empty(folder: Path) -> None:
    """DataError where shards cannot be written to `folder`, or something is there already."""
    if folder.exists() and not folder.is_dir():
        raise DataError("the folder for the token shards is a file", "name another, or remove it", str(folder))
    if folder.exists() and any(folder.iterdir()):
        raise DataError("the folder for the token shards is not empty", "name another, or remove it", str(folder))
    if would_be_taken_for_one(folder.absolute()):
        raise DataError("the folder for the token shards has the name of a checkpoint", "name another", str(folder))
    if why := obstacle(folder.absolute().parent):  # they are written beside it
        raise DataError(f"the token shards cannot be written: {why}", "name another folder", str(folder))


def _write(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, source: dict[str, Any], ledger: RowLedger
) -> dict[str, Any]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    shards = _ShardWriter(folder, dtype)
    files: dict[str, int] = {}
    count, started = 0, time.monotonic()
    with (folder / "offsets.bin").open("wb") as offsets, (folder / "origins.bin").open("wb") as origins:
        offsets.write(np.zeros(1, "<i8").tobytes())
        last_line = started
        for batch in _batches(documents):
            encoded = token_arrays(tokenizer, [document.text for document in batch], dtype)
            ends = shards.tokens + np.cumsum([len(tokens) for tokens in encoded], dtype="<i8")
            for tokens in encoded:
                shards.write(tokens)
            offsets.write(ends.tobytes())
            places = [(files.setdefault(document.file, len(files)), document.line) for document in batch]
            origins.write(np.array(places, _ORIGIN).tobytes())
            count += len(batch)
            if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                log.info("tokenizing: %s", _progress(count, shards.tokens, last_line - started))
    shards.close()
    if not count:
        bad = ledger.summary()
        raise DataError(f"the data set has no document{f' ({bad})' if bad else ''}", "give other data", source["name"])
    log.info("tokenized: %s", _progress(count, shards.tokens, time.monotonic() - started))
    rows = {
        "read": ledger.rows,
        "passed_over": ledger.passed_over,
        "mended": ledger.mended,
        "first_place": ledger.first_place,
    }
    index = {
        "documents": count,
        "tokens": shards.tokens,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "source": source,
        "rows": rows,
        "shards": shards.index,
        "files": list(files),
    }
    return _write_index(folder, index, copy_tokenizer(tokenizer, folder), shards.sha256)


def _write_index(folder: Path, content: dict[str, Any], copies: list[str], known: dict[str, str]) -> dict[str, Any]:
    """Writes index.json, the last file of the folder, and returns it. copies: the tokenizer's files. known: sha256 of
    files that need not be read for it."""
    names = [*(shard["name"] for shard in content["shards"]), "offsets.bin", "origins.bin", *copies]
    digests = {name: known.get(name) or sha256(folder / name) for name in names}
    identity: list[Any] = [content["dtype"], *(digests[name] for name in names[: len(content["shards"]) + 1])]
    identity += content.get("mixture", [])
    index = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **content,
        "sizes": {name: (folder / name).stat().st_size for name in names},
        "sha256": digests,
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return index


def _join(parts: Sequence["PreparedTokens"], folder: Path, weights: Sequence[float] | None) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    files: list[str] = []
    tokens = 0
    of_one = {"offsets.bin", "origins.bin", *(shard["name"] for shard in parts[0].index["shards"])}
    copies = [name for name in parts[0].index["sizes"] if name not in of_one]
    for name in copies:  # before there are links: whatever its name, it is no other part's shard that is written to
        shutil.copyfile(parts[0].folder / name, folder / name)
    with (folder / "offsets.bin").open("wb") as offsets, (folder / "origins.bin").open("wb") as origins:
        offsets.write(np.zeros(1, "<i8").tobytes())
        for part in parts:
            for shard in part.index["shards"]:
                name = _shard_name(len(shards))
                _link_or_copy(part.folder / shard["name"], folder / name)
                shards.append({**shard, "name": name})
                digests[name] = part.index["sha256"][shard["name"]]
            places = _mapped(part.folder / "origins.bin", _ORIGIN)
            for begin in range(0, part.documents, _LENGTHS_TOGETHER):
                offsets.write((part.offsets[begin + 1 :][:_LENGTHS_TOGETHER] + tokens).astype("<i8").tobytes())
                some = np.array(places[begin:][:_LENGTHS_TOGETHER])
                some["file"] += len(files)
                origins.write(some.tobytes())
            tokens += part.tokens
            files += [_with_source(name, part.index["source"]) for name in part.index["files"]]
    sources = [part.index["source"] for part in parts]
    columns = {source.get("text_column") for source in sources}
    rows = [part.index["rows"] for part in parts]
    mixture = [
        {"documents": own["documents"], "weight": own["weight"] * weight}
        for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True)
        for own in part.mixture or [{"documents": part.documents, "weight": 1.0}]
    ]
    index = {
        **{key: parts[0].index[key] for key in _TOKENIZER_KEYS},
        **({"mixture": mixture} if any(own["weight"] != 1.0 for own in mixture) else {}),
        "documents": sum(part.documents for part in parts),
        "tokens": tokens,
        "source": {"name": f"{len(parts)} parts", "parts": sources}
        | ({"text_column": columns.pop()} if len(columns) == 1 else {}),
        "rows": {
            "read": sum(part["read"] for part in rows),
            "passed_over": sum((Counter(part["passed_over"]) for part in rows), Counter()),
            "mended": sum((Counter(part["mended"]) for part in rows), Counter()),
            "first_place": {reason: place for part in reversed(rows) for reason, place in part["first_place"].items()},
        },
        "shards": shards,
        "files": files,
    }
    return _write_index(folder, index, copies, digests)


def _with_source(file: str, source: dict[str, Any]) -> str:
    """A part's file, named so that it differs from files of that name in other parts."""
    if "parts" in source:  # joined before
        return file
    name = source["name"]
    return name if Path(name).name == file else f"{name}/{file}"


def _link_or_copy(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, to)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def token_arrays(tokenizer: Tokenizer, texts: list[str], dtype: np.dtype) -> list[np.ndarray]:
    """The ids of each text as a document: BOS where the family has one, the text's, EOS."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [tokenizer.eos_id]
    return [np.array([*begin, *ids, *end], dtype) for ids in tokenizer.encode_batch(texts)]


def _progress(documents: int, tokens: int, seconds: float) -> str:
    return f"{documents:,} documents, {tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f} per s)"


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


class _ShardWriter:
    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.tokens = 0
        self.index: list[dict[str, Any]] = []
        self.sha256: dict[str, str] = {}
        """Of every closed shard, by name."""
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    def write(self, tokens: np.ndarray) -> None:
        if not self.index or self.index[-1]["tokens"] + len(tokens) > SHARD_TOKENS:
            self.close()
            self.index.append({"name": _shard_name(len(self.index)), "tokens": 0})
            self._file = (self.folder / self.index[-1]["name"]).open("wb")
            self._digest = hashlib.sha256()
        assert self._file is not None
        content = tokens.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.index[-1]["tokens"] += len(tokens)
        self.tokens += len(tokens)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.sha256[self.index[-1]["name"]] = self._digest.hexdigest()


def _mapped(path: Path, dtype: np.dtype) -> np.memmap:
    try:
        return np.memmap(path, dtype, mode="r")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        what = "the file system of the token shards cannot map files into memory"
        raise DataError(what, "copy the folder to another disk", str(path.parent)) from error


def _copy(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copies parts of mapped files, (target, source), for which the disk is asked all at once and without Python's
    lock. By itself a copy would wait for one page after the other, and where it is short numpy keeps the lock
    meanwhile, so that the training loop waits too."""
    spans = []
    for _, source in parts:
        address = source.__array_interface__["data"][0]
        begin = address - address % mmap.PAGESIZE
        spans.append((begin, address + source.nbytes - begin))
    for advice in (_WILL_NEED, _POPULATE_READ):
        for begin, length in spans:
            _advise(begin, length, advice)
    for target, source in parts:
        target[:] = source


def _advise(address: int, length: int, advice: int) -> None:
    """madvise, on whose success nothing depends: kernels before Linux 5.14 do not know _POPULATE_READ."""
    if _madvise is not None:
        _madvise(address, length, advice)


def _may_be_mapped() -> int:
    """How many shards may be mapped at a time: each takes a file descriptor, and training and validation data share
    what the process may open."""
    may_open, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(may_open // 4, _MOST_MAPPED) if may_open > 0 else _MOST_MAPPED  # RLIM_INFINITY is -1


def _damage(index: dict[str, Any]) -> str:
    """What is wrong with the content of an index.json of this version, "" if nothing is."""
    wrong = (key for key, kind in _INDEX.items() if not isinstance(index.get(key), kind))
    if (key := next(wrong, None)) is not None:
        return f"{key} is {str(index.get(key))[:40]!r}"
    if not isinstance(index.get("bos_id", ""), int | None):
        return "it has no bos_id"
    if index["dtype"] not in ("uint16", "uint32"):
        return f"dtype is {index['dtype']!r}"
    for name, kind in {"read": int, "passed_over": dict, "mended": dict, "first_place": dict}.items():
        if not isinstance(index["rows"].get(name), kind):
            return f"rows has no {name}"
    for shard in index["shards"]:
        if not (
            isinstance(shard, dict) and isinstance(shard.get("name"), str) and isinstance(shard.get("tokens"), int)
        ):
            return f"a shard is {str(shard)[:40]!r}"
    for name in (*index["sizes"], *(shard["name"] for shard in index["shards"])):
        if name in ("", "..", "index.json") or Path(name).name != name:  # a path would lead out of the folder
            return f"it names the file {name[:40]!r}"
    for name in ("offsets.bin", "origins.bin", *(shard["name"] for shard in index["shards"])):
        if not (isinstance(index["sizes"].get(name), int) and isinstance(index["sha256"].get(name), str)):
            return f"it has no size or no sha256 of {name}"
    if miscounted := _miscounted(index):
        return miscounted
    mixture = index.get("mixture", [])
    try:
        parts = [int(part["documents"]) for part in mixture if 0 < float(part["weight"]) <= _MOST_OFTEN]
    except (KeyError, TypeError, ValueError, OverflowError):
        parts = [-1]
    told = not mixture or (min(parts, default=-1) >= 0 and sum(parts) == index["documents"])
    return "" if told else f"mixture is {str(mixture)[:40]!r}"


def _miscounted(index: dict[str, Any]) -> str:
    """Where the numbers of documents and tokens in an index.json contradict each other or the files' sizes, "" if
    nowhere. Who reads the folder makes room by them."""
    documents, tokens, sizes = index["documents"], index["tokens"], index["sizes"]
    of_shards = [shard["tokens"] for shard in index["shards"]]
    if documents < 1 or not of_shards or min(of_shards) < 1:
        return f"it has {documents} documents in {len(of_shards)} shards, the smallest of {min(of_shards, default=0)}"
    if sum(of_shards) != tokens:
        return f"it has {tokens} tokens, and its shards {sum(of_shards)}"
    for name, size in {
        "offsets.bin": 8 * (documents + 1),
        "origins.bin": _ORIGIN.itemsize * documents,
        **{shard["name"]: np.dtype(index["dtype"]).itemsize * shard["tokens"] for shard in index["shards"]},
    }.items():
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes, and what it holds {size}"
    return ""


class PreparedTokens:
    """A folder written by `prepare`, open for reading. Nothing is read until it is asked for."""

    def __init__(self, folder: Path, verify: bool = False, sizes: bool = True) -> None:
        """DataError when the folder is not whole, or (with `verify`) a byte of it has changed. Without `sizes` only the
        names are looked for, and a shard's size when it is first read: for the many ranks beside the one that has
        looked at every file, on a file system that all share."""
        self.folder = folder
        try:
            index = json.loads((folder / "index.json").read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError("the folder holds no token shards", "prepare it again", str(folder)) from error
        self.index: dict[str, Any] = index if isinstance(index, dict) else {}
        if self.index.get("format") != FORMAT or self.index.get("version") != FORMAT_VERSION:
            found = f"{self.index.get('format')} {self.index.get('version')}"
            raise DataError(
                f"the shards are of the format {found}, not {FORMAT} {FORMAT_VERSION}", "prepare it again", str(folder)
            )
        if damaged := _damage(self.index):
            raise DataError(f"index.json is damaged: {damaged}", "prepare the data again", str(folder))
        self._check_files(verify, sizes)
        self.documents: int = self.index["documents"]
        self.tokens: int = self.index["tokens"]
        self.fingerprint: str = self.index["fingerprint"]
        self.offsets = self._map("offsets.bin", "<i8")
        if (self.offsets[0], self.offsets[-1]) != (0, self.tokens):
            raise self._misplaced()
        self._shard = lru_cache(maxsize=_may_be_mapped())(self._map_shard)
        self._shard_starts = np.cumsum([0] + [shard["tokens"] for shard in self.index["shards"]])[:-1]

    def _map(self, name: str, dtype: str) -> np.ndarray:
        self._check_size(name)
        return np.asarray(_mapped(self.folder / name, np.dtype(dtype).newbyteorder("<")))

    def _map_shard(self, number: int) -> np.ndarray:
        return self._map(self.index["shards"][number]["name"], self.index["dtype"])

    def _check_size(self, name: str) -> None:
        path, size = self.folder / name, self.index["sizes"][name]
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise DataError(f"a file of the token shards {what}", "prepare the data again", str(path))

    def _check_files(self, verify: bool, all_sizes: bool) -> None:
        sizes = self.index["sizes"]
        names = set() if all_sizes else {path.name for path in self.folder.iterdir()}
        for name in sizes:
            if name not in names:
                self._check_size(name)
        if not verify:
            return
        if sum(sizes.values()) > VERIFIED_BYTES:
            log.info("the shards' sha256 is not checked: they hold %.0f GiB", sum(sizes.values()) / 2**30)
            return
        with ThreadPoolExecutor(available_processors()) as pool:
            digests = pool.map(lambda name: sha256(self.folder / name), sizes)
            for name, digest in zip(sizes, digests, strict=True):
                if digest != self.index["sha256"][name]:
                    place = str(self.folder / name)
                    raise DataError("a file of the token shards has changed (sha256)", "prepare the data again", place)

    @property
    def mixture(self) -> list[dict[str, Any]]:
        """`documents` and `weight` of each part, in order, where they were joined with weights; else empty."""
        return self.index.get("mixture", [])

    def mixed(self, documents: np.ndarray) -> np.ndarray:
        """What an epoch of training on `documents`, which ascend, has: each as often as its part's weight says. Of a
        weight of 2.25 all documents come twice, and every fourth once more, in every epoch the same ones."""
        if not self.mixture:
            return documents
        chosen, end = [], 0
        for part in self.mixture:
            begin, end = end, end + part["documents"]
            own = documents[slice(*np.searchsorted(documents, [begin, end]))]
            once_more = round(math.modf(part["weight"])[0] * len(own))
            chosen += [own] * int(part["weight"])
            chosen.append(own[np.arange(once_more) * len(own) // max(once_more, 1)])
        return np.concatenate(chosen)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """How many tokens each document has, int64."""
        starts, ends = self.offsets[numbers], self.offsets[numbers + 1]
        if len(starts) and (starts.min() < 0 or ends.max() > self.offsets[-1] or (ends < starts).any()):
            raise self._misplaced()
        return ends - starts

    def _misplaced(self) -> DataError:
        what = "offsets.bin is damaged: documents do not begin where others end"
        return DataError(what, "prepare the data again", str(self.folder))

    def document(self, number: int) -> np.ndarray:
        """The ids of a document, with BOS and EOS."""
        return next(iter(self.read_documents(np.array([number]))))

    def read_documents(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of each document, as views into the files."""
        starts, ends = self.offsets[numbers], self.offsets[numbers + 1]
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        before = self._shard_starts[shards]
        for shard, start, end in zip(shards, starts - before, ends - before, strict=True):
            document = self._shard(int(shard))[start:end]
            if len(document) != end - start:  # it would not lie in one shard
                raise self._misplaced()
            yield document

    def origin(self, number: int) -> str:
        """`file:line` of a document."""
        file, line = self._map("origins.bin", "u1").view(_ORIGIN)[number]
        return f"{self.index['files'][file]}:{line}"


class SampleOrder:
    """Samples of `seq_len` + 1 tokens over chosen documents: sample g is a pure function of (seed, g).

    In each epoch, which is g // samples_per_epoch, the documents are permuted, joined, and cut into windows that start
    `seq_len` apart, so that each token but the first is a label once. What is left at the end, less than a sequence, is
    dropped. The windows are visited in strides over the whole epoch: neighbours often come from one long document, and
    a batch of them would be less varied."""

    def __init__(self, tokens: PreparedTokens, documents: np.ndarray, seq_len: int, seed: int) -> None:
        # Every rank holds these: 4 bytes a document here, and 12 in the order of an epoch, 20 while it is made.
        self.documents = documents.astype(np.uint32 if tokens.documents < 2**32 else np.int64, copy=False)
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.tokens_per_epoch = sum(int(lengths.sum()) for _, lengths in self._lengths(self.documents))
        self.samples_per_epoch = max(0, self.tokens_per_epoch - 1) // seq_len
        self.dropped_tokens = self.tokens_per_epoch - min(self.tokens_per_epoch, self.samples_per_epoch * seq_len + 1)
        self._stride = _coprime_near(0.618034 * self.samples_per_epoch, self.samples_per_epoch)
        self._epoch = lru_cache(maxsize=1)(self._permute)  # samples are read in order, so one epoch is enough

    def _permute(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in the epoch's order, where each begins and the last ends)."""
        self._epoch.cache_clear()  # one epoch in memory at a time
        # Philox's raw output never changes; that of Generator.permutation may change with numpy's version.
        keys = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.documents))
        order = np.argsort(keys, kind="stable")
        del keys
        documents = self.documents[order]
        del order
        bounds = np.zeros(len(documents) + 1, np.int64)
        for begin, lengths in self._lengths(documents):
            bounds[begin + 1 : begin + 1 + len(lengths)] = lengths
        return documents, np.cumsum(bounds, out=bounds)

    def _lengths(self, documents: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(position, lengths from there on) of `documents`, in parts, so that they take little memory."""
        for begin in range(0, len(documents), _LENGTHS_TOGETHER):
            yield begin, self.tokens.lengths(documents[begin : begin + _LENGTHS_TOGETHER])

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, labels) of samples `first` to `first + count`, int64 [count, seq_len] each."""
        rows = np.empty((count, self.seq_len + 1), np.int64)
        places = [self._place(sample) for sample in range(first, first + count)]
        for epoch in sorted({epoch for epoch, _ in places}):
            chosen = [i for i in range(count) if places[i][0] == epoch]
            starts = np.array([places[i][1] * self.seq_len for i in chosen])
            self._fill([rows[i] for i in chosen], epoch, starts)
        return rows[:, :-1], rows[:, 1:]

    def _place(self, sample: int) -> tuple[int, int]:
        """(epoch, window in it) of a sample."""
        epoch, index = divmod(sample, self.samples_per_epoch)
        return epoch, index * self._stride % self.samples_per_epoch

    def _fill(self, rows: list[np.ndarray], epoch: int, starts: np.ndarray) -> None:
        """Fills each row with the epoch's tokens from its start on."""
        parts = self._parts(rows, epoch, starts)
        while some := list(itertools.islice(parts, _FETCHED_TOGETHER)):
            _copy(some)

    def _parts(self, rows: list[np.ndarray], epoch: int, starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What fills the rows: (part of a row, its tokens as a view into the file)."""
        documents, bounds = self._epoch(epoch)
        width = self.seq_len + 1
        places = np.searchsorted(bounds, starts, side="right") - 1
        lasts = np.searchsorted(bounds, starts + width, side="left")
        skips = starts - bounds[places]
        first_documents = self.tokens.read_documents(documents[places])
        of_each = zip(rows, first_documents, skips.tolist(), places.tolist(), lasts.tolist(), strict=True)
        for row, document, skip, place, last in of_each:
            taken = document[skip : skip + width]
            filled = len(taken)
            yield row[:filled], taken
            for document in self.tokens.read_documents(documents[place + 1 : last]) if filled < width else ():
                taken = document[: width - filled]
                yield row[filled : filled + len(taken)], taken
                filled += len(taken)
            assert filled == width

    def pieces(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """(document, first token in it, number of tokens) of each piece that a sample is made of."""
        epoch, window = self._place(sample)
        documents, bounds = self._epoch(epoch)
        start, end = window * self.seq_len, (window + 1) * self.seq_len
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        for place in itertools.count(first):
            if bounds[place] >= end:
                return
            begin, stop = max(start, int(bounds[place])), min(end, int(bounds[place + 1]))
            yield int(documents[place]), begin - int(bounds[place]), stop - begin


def _coprime_near(value: float, modulus: int) -> int:
    """The first integer from `value` on that is coprime to `modulus`, so that its multiples visit every residue."""
    number = max(1, round(value))
    while math.gcd(number, modulus) > 1:
        number += 1
    return number
