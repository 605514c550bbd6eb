"""Documents out of local files, one at a time. Rows that cannot be used are counted and reported.

A row is a document; a .txt, .md or .py file is one too, or is cut into several where there are few files. A bad row
never stops a run and is never dropped silently: it goes into a `RowLedger`. A bad file (missing, truncated, or the only
one and without the text column) is a DataError.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from titan_fast.errors import DataError
from titan_fast.tokenizer import valid_unicode

LONGEST_DOCUMENT = 4 * 1024 * 1024
"""Longer documents are cut, so that memory stays bounded. Characters; in text files bytes."""
_MANY_FILES = 100
"""If there are at least so many files, each text file is one document."""
LONGEST_ROW = 256 * 1024 * 1024
"""Longer lines are skipped instead of being read into memory. Bytes."""
MOST_BAD_ROWS = 0.5
"""If more than this part of the rows is bad, the data is refused. Empty rows do not count as bad, since they are
common."""
_EMPTY = "empty"
_ROWS_TO_JUDGE = 10_000  # after so many rows, data that is mostly bad or lacks its text column is refused at once

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".zst")


class Document(NamedTuple):
    """A text and where it is from: `line` is its first line, or its row in a parquet file, from 1."""

    text: str
    file: str
    line: int


@dataclass
class RowLedger:
    """Counts rows: all that were read, and those that were skipped or repaired, by reason, with the first place of
    each."""

    name: str = ""
    """The data set, for messages."""
    column: str = "text"
    """The field with the text."""
    rows: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    mended: dict[str, int] = field(default_factory=dict)
    first_place: dict[str, str] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)
    """The fields of rows that have no text field."""
    has_column: bool = False
    """Whether any row had the text field."""
    files_without: list[str] = field(default_factory=list)
    """Whole files without the text field."""

    def count(self, rows: int = 1) -> None:
        """Counts rows that were read. DataError once it is clear, after many of them, that the data is of no use."""
        self.rows += rows
        if self.rows >= _ROWS_TO_JUDGE and self.rows % 1000 == 0:
            self.check()

    def pass_over(self, reason: str, place: str, count: int = 1) -> None:
        self.passed_over[reason] = self.passed_over.get(reason, 0) + count
        self.first_place.setdefault(reason, place)

    def pass_over_file(self, columns: Iterable[str], name: str) -> None:
        """Skips a table of these columns, which lacks the text column."""
        self.columns.update(columns)
        self.files_without.append(name)
        self.count()
        self.pass_over(f"whole file without {self.column!r}", name)

    def mend(self, reason: str, place: str) -> None:
        self.mended[reason] = self.mended.get(reason, 0) + 1
        self.first_place.setdefault(reason, place)

    def summary(self) -> str:
        """One line; empty when every row was good."""
        parts = []
        for verb, counts in (("skipped", self.passed_over), ("repaired", self.mended)):
            if counts:
                reasons = (f"{count} {reason} (first {self.first_place[reason]})" for reason, count in counts.items())
                parts.append(f"{sum(counts.values())} of {self.rows} rows {verb}: {', '.join(reasons)}")
        return "; ".join(parts)

    def check(self) -> None:
        """DataError when most rows are bad, or all are bad or empty."""
        unused = sum(self.passed_over.values())
        bad = unused - self.passed_over.get(_EMPTY, 0)
        if bad > MOST_BAD_ROWS * self.rows or 0 < self.rows <= unused:
            if self.columns and not self.has_column:
                raise self.missing_column()
            raise DataError(f"most rows cannot be used: {self.summary()}", "fix the data", self.name)

    def missing_column(self) -> DataError:
        """An error that names the first file or row without the text column."""
        place = next(place for reason, place in self.first_place.items() if f"without {self.column!r}" in reason)
        return missing_column(
            self.column, self.columns, place, "most of the data lacks" if self.has_column else "no row has"
        )


def missing_column(column: str, columns: Iterable[str], name: str, lacks: str = "no row has") -> DataError:
    names = ", ".join(name if name.isprintable() else ascii(name) for name in sorted(columns))
    return DataError(
        f"{lacks} the text column {column!r}; the columns are {names or 'none'}",
        "set training.text_column, or give data that has it",
        name,
    )


def usable_texts(value: Any, place: str, ledger: RowLedger) -> Iterator[str]:
    """The document in a row's text field; nothing if it is unusable, several if it is longer than
    `LONGEST_DOCUMENT`."""
    if value is None:
        ledger.pass_over("null", place)
    elif not isinstance(value, str):
        ledger.pass_over("not a string", place)
    elif not value or value.isspace():
        ledger.pass_over(_EMPTY, place)
    elif value.count("\0") > len(value) // 8:  # ASCII in UTF-16 has as many as letters, and is valid UTF-8
        ledger.pass_over("with NUL for every eighth character and more (UTF-16, or no text)", place)
    else:
        text = valid_unicode(value)
        if text is not value:
            ledger.mend("with lone surrogates replaced", place)
        if len(text) > LONGEST_DOCUMENT:
            ledger.mend(f"cut into documents of {LONGEST_DOCUMENT} characters", place)
        for start in range(0, len(text), LONGEST_DOCUMENT):
            yield text[start : start + LONGEST_DOCUMENT]


def row_texts(row: Any, place: str, ledger: RowLedger) -> Iterator[str]:
    """`usable_texts` of a row's text field."""
    column = ledger.column
    if not isinstance(row, dict):
        ledger.pass_over("not an object", place)
    elif column not in row:
        if len(ledger.columns) < 100:
            ledger.columns.update(str(key) for key in row)
        ledger.pass_over(f"without {column!r}", place)
    else:
        ledger.has_column = True
        yield from usable_texts(row[column], place, ledger)


@dataclass(frozen=True)
class Corpus:
    """Local files, in the order in which their documents are numbered."""

    root: Path
    files: tuple[Path, ...]
    text_column: str = "text"
    other_files: int = 0
    """How many things in the folder are not read: files of other kinds, broken links, links to folders or to files that
    are read anyway, run directories, token shards."""

    def fingerprint(self) -> str:
        """sha256 of the files' names, sizes and times, and of what decides how they are read."""
        digest = hashlib.sha256(json.dumps([self.text_column, LONGEST_DOCUMENT, self._few]).encode())
        for path in self.files:
            status = path.stat()
            entry = [path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(entry).encode())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """The file or folder."""
        return str(self.files[0] if len(self.files) == 1 else self.root)

    @property
    def has_rows(self) -> bool:
        """Whether any file has rows with columns."""
        return any(_kind(path) in ROW_SUFFIXES for path in self.files)

    def documents(self, ledger: RowLedger, files: Iterable[Path] | None = None) -> Iterator[Document]:
        """Every usable document. DataError when a file cannot be read, or too little of the data can be used. Tables
        without the text column are skipped if they are the smaller part of the data."""
        ledger.name, ledger.column = self.name, self.text_column
        longest = self._longest_text()
        for path in self.files if files is None else files:
            yield from _documents_of(path, path.relative_to(self.root).as_posix(), longest, ledger)
        ledger.check()
        without = sum((self.root / name).stat().st_size for name in ledger.files_without)
        if without > MOST_BAD_ROWS * self._bytes():
            raise ledger.missing_column()

    @property
    def _few(self) -> bool:
        return len(self.files) < _MANY_FILES

    def _longest_text(self) -> int:
        """Longest document of a text file, in bytes. Few files are cut into a hundred documents or more, so that there
        are enough to share between ranks, and one in a hundred can be held out for validation."""
        if not self._few:
            return LONGEST_DOCUMENT
        return min(LONGEST_DOCUMENT, max(2048, self._bytes() // 100))

    def _bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def open_corpus(path: Path, text_column: str) -> Corpus:
    """The corpus of a file, or of all files under a folder; DataError when there is none of a known kind."""
    known = f"known: {' '.join(TEXT_SUFFIXES + ROW_SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)}"
    if path.is_file():
        if not _kind(path):
            raise DataError(f"a file of an unknown kind ({path.suffix or 'no suffix'})", known, str(path))
        return Corpus(path.parent, (path,), text_column)
    if not path.is_dir():
        what = "it is neither a file nor a folder" if path.exists() else "there is no such file or folder"
        raise DataError(what, "check the dataset_path", str(path))
    found = sorted(_walk(path), key=lambda file: file.relative_to(path).parts)
    files = _each_once(file for file in found if _kind(file) and file.is_file())  # no link to nothing, no pipe
    if not files:
        suffixes = sorted({file.suffix or "no suffix" for file in found})[:10]
        what = f"none of its {len(found)} files is of a known kind ({', '.join(suffixes)})" if found else "it is empty"
        raise DataError(f"the folder holds no data: {what}", known, str(path))
    return Corpus(path, files, text_column, other_files=len(found) - len(files))


def _each_once(files: Iterable[Path]) -> tuple[Path, ...]:
    """Drops links to files that are read anyway, or held-out text might be trained on under another name."""
    files = tuple(files)
    links = [file for file in files if file.is_symlink()]
    if not links:
        return files
    read = {file.resolve() for file in set(files).difference(links)}
    repeated = set()
    for link in links:
        if (target := link.resolve()) in read:
            repeated.add(link)
        read.add(target)
    return tuple(file for file in files if file not in repeated)


def _walk(root: Path, left_out: Container[str] = ()) -> Iterator[Path]:
    """Everything under `root` that is not a folder, except hidden things. Linked folders (which may form a loop), run
    directories and token shards are not entered; they are yielded themselves. DataError for an unreadable folder."""

    def refuse(error: OSError) -> None:
        raise DataError(f"a folder cannot be read: {error.strerror}", "fix it, or take it out", str(error.filename))

    for folder, folders, names in os.walk(root, onerror=refuse):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        not_entered = [name for name in folders if (here / name).is_symlink() or _is_ours(here / name)]
        folders[:] = [name for name in folders if name not in not_entered]
        yield from (here / name for name in (*names, *not_entered) if not name.startswith("."))


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder of token shards or a run directory, whose files are not documents and change during a
    run."""
    begun = any((folder / name).exists() for name in ("run.lock", "metrics.jsonl"))
    has_shards = all((folder / name).is_file() for name in ("index.json", "offsets.bin", "origins.bin"))
    return has_shards or (begun and (folder / "config.toml").is_file())


def stdlib_corpus() -> Corpus:
    """The source of this Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in _walk(root, left_out) if path.suffix == ".py"]
    if not files:
        raise DataError("this Python has no source of its standard library", "give training.dataset_path", str(root))
    return Corpus(root, tuple(sorted(files, key=lambda path: path.relative_to(root).parts)))


def _kind(path: Path) -> str:
    """The suffix, without that of a compression, that decides how a file is read; "" if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT_SUFFIXES + ROW_SUFFIXES else ""


def _documents_of(path: Path, name: str, longest_text: int, ledger: RowLedger) -> Iterator[Document]:
    with _reading(path), _open(path) as stream:
        kind = _kind(path)
        if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]  # buffered
            ledger.count()  # most of its bytes would be valid UTF-8, with NULs between the letters
            ledger.pass_over("whole file in UTF-16, not UTF-8", name)
            return
        if kind in TEXT_SUFFIXES:
            rows = _text_file(stream, longest_text, name, ledger)
        elif kind == ".csv":
            rows = _csv(stream, name, ledger)
        elif kind == ".parquet":
            rows = _parquet(path, stream, name, ledger)
        else:
            rows = _json(stream, name, ledger, may_be_whole=kind == ".json")
        for line, text in rows:
            yield Document(text, name, line)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors of the file as a whole into a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        why = _one_line(error)
        fix = "restore it"
        if isinstance(error, PermissionError):
            fix = "give this user the right to read it"
        elif "too much memory" in why:  # zstd's words for a window of over 128 MiB
            fix = "compress it again with a window of 128 MiB at most (zstd --long=27)"
        raise DataError(f"cannot read the file: {why}", fix, str(path)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix.lower() == ".zst":
        import pyarrow  # zstandard's own reader does not notice a truncated file

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(path, compression="zstd")))
    return path.open("rb")


def _text_file(stream: BinaryIO, longest: int, name: str, ledger: RowLedger) -> Iterator[tuple[int, str]]:
    for number, (line, content) in enumerate(_pieces(stream, longest)):
        ledger.count()
        try:
            text = content.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as error:
            ledger.pass_over("invalid UTF-8", f"{name}:{line + content.count(10, 0, error.start)}")
            continue
        yield from ((line, text) for text in usable_texts(text, f"{name}:{line}", ledger))


def _pieces(stream: BinaryIO, longest: int) -> Iterator[tuple[int, bytes]]:
    """(first line, content) of pieces of about `longest` bytes, cut at line ends where there are any."""
    held: list[bytes] = []
    size, first_line, line = 0, 1, 1
    while block := stream.readline(longest):
        if not block.endswith(b"\n"):
            block += stream.read(_bytes_missing(block))
        if held and size + len(block) > longest:
            yield first_line, b"".join(held)
            held, size, first_line = [], 0, line
        held.append(block)
        size += len(block)
        line += block.endswith(b"\n")
    if held or line == 1:
        yield first_line, b"".join(held)


def _bytes_missing(block: bytes) -> int:
    """How many bytes of its last UTF-8 character `block` still lacks."""
    for seen, byte in enumerate(reversed(block[-3:]), start=1):
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return max(0, length - seen)
        if byte < 0x80:
            return 0
    return 0


def _lines(stream: BinaryIO, name: str, ledger: RowLedger) -> Iterator[tuple[int, str]]:
    """(number, text) of lines that can be decoded and are not blank; those that cannot go into the ledger."""
    number = 0
    while line := stream.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
            while (rest := stream.readline(LONGEST_ROW)) and not rest.endswith(b"\n"):
                pass
            ledger.count()
            ledger.pass_over(f"longer than {LONGEST_ROW} bytes", f"{name}:{number}")
            continue
        if not line.strip():
            continue
        ledger.count()
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            ledger.pass_over("invalid UTF-8", f"{name}:{number}")


def _json(stream: BinaryIO, name: str, ledger: RowLedger, may_be_whole: bool) -> Iterator[tuple[int, str]]:
    """JSON lines; a .json file may also be one array of rows, or one row over many lines."""
    if may_be_whole:
        head: bytes = stream.peek(1 << 16)  # type: ignore[attr-defined]  # every stream of _open is buffered
        head = head.removeprefix(codecs.BOM_UTF8)
        if head.lstrip()[:1] == b"[" or _is_open_object(head):
            yield from _whole_json(stream, name, ledger)
            return
    for number, line in _lines(stream, name, ledger):
        place = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            ledger.pass_over("broken JSON", place)
            continue
        yield from ((number, text) for text in row_texts(row, place, ledger))


def _is_open_object(head: bytes) -> bool:
    """Whether the first line is just an opening brace, as in indented JSON."""
    return head.lstrip().split(b"\n", 1)[0].strip() == b"{"


def _whole_json(stream: BinaryIO, name: str, ledger: RowLedger) -> Iterator[tuple[int, str]]:
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"the JSON file is broken: {error}", "fix it, or give one row per line", name) from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        ledger.count()
        yield from ((number, text) for text in row_texts(row, f"{name}:{number}", ledger))


def _csv(stream: BinaryIO, name: str, ledger: RowLedger) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(LONGEST_ROW)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise DataError(f"the header of the CSV file is broken: {error}", "fix it", name) from error
    if header is None:
        return
    if ledger.column not in header:
        ledger.pass_over_file(header, name)
        return
    ledger.has_column = True
    position = header.index(ledger.column)
    while True:
        first_line = reader.line_num + 1
        place = f"{name}:{first_line}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a stray quote may have swallowed many lines
            lines = max(1, reader.line_num + 1 - first_line)
            ledger.pass_over("broken CSV", place, lines)
            ledger.count(lines)
            continue
        if not row:
            continue
        ledger.count()
        if any(row[len(header) :]):  # an unquoted comma cut a text in two
            ledger.pass_over("more fields than the header", place)
            continue
        value = row[position] if position < len(row) else None
        if value is not None and any("\udc80" <= character <= "\udcff" for character in set(value)):
            ledger.pass_over("invalid UTF-8", place)
            continue
        yield from ((first_line, text) for text in usable_texts(value, place, ledger))


def _parquet(path: Path, stream: BinaryIO, name: str, ledger: RowLedger) -> Iterator[tuple[int, str]]:
    import pyarrow
    import pyarrow.parquet

    column = ledger.column
    source = path if path.suffix.lower() == ".parquet" else pyarrow.BufferReader(stream.read())
    try:
        file = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
        if column not in file.schema_arrow.names:
            ledger.pass_over_file(file.schema_arrow.names, name)
            return
        ledger.has_column = True
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in _arrow_values(batch.column(0)):
                number += 1
                ledger.count()
                if isinstance(value, UnicodeDecodeError):
                    ledger.pass_over("invalid UTF-8", f"{name}:{number}")
                else:
                    yield from ((number, text) for text in usable_texts(value, f"{name}:{number}", ledger))
    except pyarrow.ArrowException as error:
        raise DataError(f"the parquet file is damaged: {_one_line(error)}", "restore it", str(path)) from error


def _arrow_values(values: Any) -> Iterator[Any]:
    """Python values. Arrow does not check that strings are UTF-8: one that is not is yielded as its
    UnicodeDecodeError."""
    import pyarrow

    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kinds = pyarrow.types
    if kinds.is_string_view(values.type):
        values = values.cast(pyarrow.binary_view())
    elif not (kinds.is_string(values.type) or kinds.is_large_string(values.type)):
        yield from values.to_pylist()
        return
    for value in values.cast(pyarrow.large_binary()).to_pylist():
        try:
            yield value if value is None else value.decode()
        except UnicodeDecodeError as error:
            yield error
